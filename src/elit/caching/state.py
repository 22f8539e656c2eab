"""Memory of a cache: each branch of guidance by its name, and the place in a run."""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import Tensor

from elit.caching.ports import Streams

UNNAMED = "unnamed"  # the branch of calls outside of any `cache_context`


@dataclass
class BranchState(BaseState):
    """Memory of a branch of guidance."""

    step: int = -1  # the last one that it took part in
    entered: tuple[Any, ...] = ()  # shape, dtype, device of the streams that entered at that step
    anchor: Streams | None = None  # the streams that the residual adds to, of the step that runs
    skips: bool = False  # whether the step that runs is skipped
    residual: Streams | None = None  # what the blocks added to the last computed step's anchor
    moulds: dict[int, Any] = field(default_factory=dict)  # of what each block returned then
    before: Tensor | None = None  # what is compared from step to step, of the step before
    total: float = 0.0  # changes since the last computed step, added up
    ratio: float = 1.0  # ratios of magnitudes since then, multiplied up
    skipped: int = 0  # steps in a row that were skipped, or could have been

    def reset(self) -> None:
        """Forget everything."""
        self.__dict__.update(vars(BranchState()))

    def keep(self, out: Streams) -> None:
        """Take the residual of a computed step, from what left the last block."""
        tokens, text = self.anchor  # type: ignore[misc]
        text_residual = None
        if text is not None and out[1] is not None and out[1].shape == text.shape:
            text_residual = out[1] - text
        # A text may have been put before the tokens on the way.
        self.residual = out[0][:, -tokens.shape[1] :] - tokens, text_residual

    def skip_to(self, given: Streams) -> tuple[Tensor, Tensor | None]:
        """The anchor and the cached residual: what leaves the last block at a skipped step."""
        (tokens, text), (residual, text_residual) = self.anchor, self.residual  # type: ignore[misc]
        tokens = tokens + residual
        before = given[0].shape[1] - tokens.shape[1]
        if before > 0:
            tokens = torch.cat((given[0][:, :before], tokens), dim=1)
        if text is not None and text_residual is not None:
            return tokens, text + text_residual
        return tokens, None


class Steps(StateManager):
    """The states of all branches, and the step that a run is at.

    A run starts where the noise level jumps back, after as many steps as it has, at step 0 of a
    pipeline that counts, and after `reset`. It starts too where a branch is at its first level
    again, or at another one for a third time: Heun's method is at all but the first level twice.
    """

    def __init__(self, num_steps: int | None = None):
        super().__init__(BranchState)
        self.default_num_steps = num_steps
        self.computed = self.skipped = 0  # calls of the blocks so far, in all runs
        self._rewind()

    def _rewind(self) -> None:
        self.step, self.num_steps = -1, self.default_num_steps  # None is not known
        self.current: BranchState | None = None  # whose blocks run, and follow a cache
        self._time: float | None = None
        self._visits = 0  # steps in a row at this level
        self._direction: int | None = -1  # noise levels go down, until they turn out to go up
        self._names: set[str] = set()  # of the calls of this step

    @property
    def context(self) -> CacheContext:
        """The branch that runs; one of its own where none was named."""
        return self._context or CacheContext(UNNAMED)

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Forget all branches: the next call begins a run."""
        super().reset(*args, **kwargs)
        self._rewind()

    def begin_call(self, timestep: Any) -> None:
        """Find the step that a call belongs to, by the largest of its timesteps."""
        context, index = self.context, self.context.step_index
        time = None
        if index is not None:
            time = -float(index)  # going down, as noise levels do
        elif timestep is not None:
            time = float(torch.as_tensor(timestep).max())
        repeated = context.name in self._names
        over = self.num_steps is not None and self.step + 1 >= self.num_steps
        ends_step = repeated or time != self._time
        again = time is not None and time == self._time and (self.step == 0 or self._visits == 2)
        turns = self._turns(time)
        if turns or (ends_step and over) or (repeated and (again or index == 0)):
            direction = self._direction
            super().reset()
            self._rewind()
            self._direction = direction
            self._context = context
        if ends_step or self.step < 0:
            self._visits = self._visits + 1 if time == self._time else 1
            self.step, self._names = self.step + 1, set()
        self._names.add(context.name)
        self._time = time
        self.num_steps = context.num_inference_steps or self.default_num_steps

    def _turns(self, time: float | None) -> bool:
        """Whether noise levels that went down go up, or the other way round: a new run."""
        if time is None or self._time is None or time == self._time:
            return False
        direction = 1 if time > self._time else -1
        turns = self._direction not in (None, direction)
        self._direction = None if turns else direction  # the next movement shows it again
        return turns

    def begin_branch(self, streams: Streams) -> BranchState:
        """State of a branch whose blocks begin: empty if it doesn't go on from the last step."""
        state: BranchState = self.get_state()
        entered = tuple(x if x is None else (x.shape, x.dtype, x.device) for x in streams)
        goes_on = state.residual is not None and state.step == self.step - 1
        if not goes_on or state.entered != entered:
            state.reset()
        state.step, state.entered, state.skips = self.step, entered, False
        self.current = state
        return state

    @property
    def is_last_step(self) -> bool:
        """Whether the run is known to end with this step."""
        return self.num_steps is not None and self.step >= self.num_steps - 1
