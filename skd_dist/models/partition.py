"""Which group of a network a parameter, a buffer or a module belongs to.

Found by running the network, not from tables of names: a parameter belongs to the first group whose feature depends on
it, which is what "stage k trains these" has to mean. Buffers and modules follow the parameters around them. Names and
shapes of groups are the business of `cut`.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


def split_parameters(model: nn.Module, outputs: Sequence[Tensor]) -> list[tuple[str, ...]]:
    """Divide the parameters among outputs of increasing depth, by walking the autograd graph back from each.

    Args:
        model: parameters that require gradients; may be on the meta device.
        outputs: tensors computed from them in one run, the shallowest first.

    Returns:
        For each output the names, in registration order, that it depends on and no earlier one does; then one more
        tuple with the parameters that none depends on.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = {name: position for position, name in enumerate(names.values())}
    seen: set[object] = set()
    found = [sorted((names[leaf] for leaf in _new_leaves(output, seen)), key=order.__getitem__) for output in outputs]
    reached = {name for group in found for name in group}
    return [tuple(group) for group in (*found, [name for name in order if name not in reached])]


def _new_leaves(output: Tensor, seen: set[object]) -> list[nn.Parameter]:
    """Leaf tensors behind `output` that no earlier call with the same `seen` has met."""
    leaves = []
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # an AccumulateGrad node: the end of the graph at a parameter
            leaves.append(node.variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return leaves


def split_modules(model: nn.Module, group_of: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Say for each module which groups its parameters are in.

    A module without parameters (dropout, activation) belongs with its parent where that is of one group, else to the
    group of the parameter registered before it.

    Args:
        model: the network.
        group_of: parameter name -> group; complete.

    Returns:
        Module path ("" is the root) -> groups, never empty; more than one for containers.
    """
    groups: dict[str, set[str]] = {path: set() for path, _ in model.named_modules()}
    for name, group in group_of.items():
        for path in _ancestors(name):
            groups[path].add(group)
    before = next(iter(group_of.values()))
    for path, module in model.named_modules():
        own = [group_of[_join(path, name)] for name, _ in module.named_parameters(recurse=False)]
        before = own[-1] if own else before
        if not groups[path]:
            parent = groups[path.rpartition(".")[0]]
            groups[path] = set(parent) if len(parent) == 1 else {before}
    return {path: frozenset(found) for path, found in groups.items()}


def split_buffers(model: nn.Module, group_of: Mapping[str, str]) -> dict[str, str]:
    """Say for each buffer which group it is in: that of its module's own parameters, else of its module as a whole.

    Where even that is several groups (a buffer of the root), it is the earliest of them: the first that may read it.

    Args:
        model: the network.
        group_of: parameter name -> group, in network order of the groups; complete.
    """
    depth = {group: position for position, group in enumerate(dict.fromkeys(group_of.values()))}
    modules = split_modules(model, group_of)
    result = {}
    for path, module in model.named_modules():
        own = {group_of[_join(path, name)] for name, _ in module.named_parameters(recurse=False)}
        group = min(own or modules[path], key=depth.__getitem__)
        result.update({_join(path, name): group for name, _ in module.named_buffers(recurse=False)})
    return result


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _ancestors(name: str) -> list[str]:
    """Paths of all modules that hold a tensor, the root ("") last."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
