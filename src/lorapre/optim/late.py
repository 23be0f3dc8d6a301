"""A step whose gradients the device has judged, and what the host makes of it when it comes by again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lorapre.optim.gradients import Verdict, report


class LateVerdict:
    """Brings a verdict to the host without a wait, and takes back what the host had counted on.

    Args:
        verdict: of a step that changes nothing on the device where it is not enabled.
        counters: on the CPU, which have been advanced by one as if it were.
    """

    def __init__(self, verdict: Verdict, counters: Sequence[Tensor]) -> None:
        self._verdict, self._counters = verdict, counters
        sizes = verdict.sizes
        self._sizes, self._arrival = sizes, None
        if sizes.device.type != "cpu":
            self._sizes = torch.empty(sizes.shape, dtype=sizes.dtype, pin_memory=True)
            self._sizes.copy_(sizes, non_blocking=True)
            self._arrival = torch.accelerator.current_stream(sizes.device).record_event()

    def settle(self) -> None:
        """Wait for the verdict. If the step was not taken: the counters are as before it, and that is said.

        Raises:
            NonFiniteGradientError: it was not, and ``nonfinite`` is "raise".
        """
        if self._arrival is not None:
            self._arrival.synchronize()
        bad = self._verdict.bad(self._sizes)
        if not bad:
            return
        for counter in self._counters:
            counter.sub_(1.0)
        report(
            self._verdict.owner,
            bad,
            "This was in the step before, which changed nothing, and neither did the present call",
        )


class SettlingOptimizer(Optimizer):
    """An optimizer whose last step may still be undecided, and that hears of it before anybody looks at its state."""

    _late: LateVerdict | None = None  # an instance's own is in no copy and in no pickle

    def settle(self) -> None:
        """Hear what became of the last step, where kernels took part in it: until then ``step()`` has not waited.

        `step`, `state_dict`, `load_state_dict`, pickles and copies do so first. If a gradient was not finite the step
        has changed no weight and no state, and here its parameters' step counters are taken back.

        Raises:
            NonFiniteGradientError: so it was, and ``nonfinite`` is "raise". A second call does not raise again.
        """
        late, self._late = self._late, None
        if late is not None:
            late.settle()

    def state_dict(self) -> dict[str, Any]:
        """The state and the groups, as every torch optimizer's.

        Raises:
            NonFiniteGradientError: see `settle`.
        """
        self.settle()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return super().__getstate__()
