"""SSKD: the backbone learns the teacher's features stage by stage, whatever the task; then the head learns the task.

Reference: Gao et al., "An Embarrassingly Simple Approach for Knowledge Distillation", arXiv 1812.01819 (first titled
"Feature Matters: A Stage-by-Stage Approach for Knowledge Transfer"). Two losses that never meet, so there is no weight
between them to choose, and this method has none.

**What differs from `skd`: nothing that is computed.** The two papers describe the same procedure, and a run of either
gives the same student, bit for bit. They differ in setting and claim: SKD takes networks of equal widths and a fraction
of the data; SSKD any task behind one backbone, all of the data, and "no loss weight". What the paper leaves open is
decided here: the L2 distance is a mean over elements; where widths differ, an adapter on the student's side trains with
its stage and is thrown away, and the next stage goes on from the student's own feature. How far each stage stays behind
is logged as `nmse/<group>`: MSE over the variance of the teacher's feature, above 1 where nothing was learned.
"""

from dataclasses import dataclass

from skd_dist.methods.skd import Skd


@dataclass(frozen=True, slots=True)
class Sskd(Skd):
    """The backbone phase, feature stages in network order, then the head phase: the procedure of `Skd`."""

    name: str = "sskd"
