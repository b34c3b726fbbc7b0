"""timm models, cut into named groups: the only door to timm.

`build` asks timm for a network; `features` knows its features and asks for them; `partition` says which parameter and
module is in which group; `cut` names the groups and runs the network as far as asked; `matching` pairs the groups of
two networks; `tail` enters a network in its middle; `cost` counts; `create` makes and
loads weights; `registry` adds the small ResNets of the stagewise paper. Training, methods and adapters are not here.

After `import skd_dist.models` timm knows the registered networks (`timm.create_model("skd_resnet10")`).
"""

from skd_dist.lean_imports import lean_imports

with lean_imports():
    from skd_dist.models import registry as registry
