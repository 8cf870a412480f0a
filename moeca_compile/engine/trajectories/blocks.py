"""Whose call is this? Which open `with trajectory:` block a call of a model belongs to.

A call belongs to the block that was entered last by a function on its stack. So a generator has its own trajectory,
whichever thread or context resumes it. Where no such function runs, the context decides (a thread, a task, or what
inherits its context): that serves child threads and tasks, and blocks that helpers enter and leave by hand.
"""

from __future__ import annotations

import dis
import inspect
import sys
import threading
from collections.abc import Collection
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING

from moeca_compile.errors import StateError

if TYPE_CHECKING:
    from moeca_compile.engine.trajectories.trajectory import Trajectory

_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_RESUME = dis.opmap["RESUME"]
_AFTER_YIELD = (1, 2)  # the operand of RESUME after `yield` and `yield from`; 3 is after `await`
_HELPERS = {"__enter__", "__aenter__", "enter_context", "__exit__", "__aexit__"}  # they act for their caller

_books = threading.RLock()  # around `_blocks`; a generator that is collected may leave its block at any moment
_blocks: dict[int, tuple[Block, ...]] = {}  # open ones, by id of the frame that entered them
# entered in this thread or task, last one last; blocks that were left in another context are still here, closed
_entered: ContextVar[tuple[Block, ...]] = ContextVar("moeca_trajectories", default=())


class Block:
    """One `with trajectory:` between enter and exit.

    Attributes:
        frame: the generator that entered it; no other frame is held (one that ends before the block would be kept).
        inside: calls came from the function that entered it, or were made for it by a child thread or task.
        outside: calls came from elsewhere while that generator was suspended.
    """

    __slots__ = ("code", "frame", "inside", "key", "open", "outside", "trajectory")

    def __init__(self, trajectory: Trajectory, frame: FrameType) -> None:
        self.trajectory, self.key, self.code = trajectory, id(frame), frame.f_code
        self.frame = frame if frame.f_code.co_flags & _GENERATOR else None
        self.open, self.inside, self.outside = True, False, False

    def is_suspended(self) -> bool:
        """Whether it was entered in a generator that waits at a `yield`: calls made now come from other code. One that
        waits at an `await` has its calls made for it, by a child thread or task."""
        if self.frame is None or self.frame.f_back is not None:
            return False
        code, after = self.frame.f_code.co_code, self.frame.f_lasti + 2
        return code[after : after + 1] == bytes([_RESUME]) and code[after + 1] & 3 in _AFTER_YIELD

    def is_in_context(self) -> bool:
        """Whether it was entered in this context, or in one that this inherits."""
        return self in _entered.get()

    def holds(self, frame: FrameType) -> bool:
        """Whether code in `frame` runs inside it, so that it may enter the trajectory once more."""
        above: FrameType | None = frame
        while above is not None:
            if id(above) == self.key and above.f_code is self.code:
                return True
            above = above.f_back
        return self.is_in_context() and not (self.inside and self.is_suspended())


def acting(frame: FrameType) -> FrameType:
    """The function whose block it is: not an `__enter__` that passes on, nor the generator of a `contextmanager`."""
    while frame.f_back is not None:
        code = frame.f_code
        passes_on = code.co_name in _HELPERS
        if not passes_on and not (code.co_flags & _GENERATOR and frame.f_back.f_code.co_name in _HELPERS):
            break
        frame = frame.f_back
    return frame


def open_block(trajectory: Trajectory, frame: FrameType) -> Block:
    """`frame` enters the trajectory: see `acting`."""
    block = Block(trajectory, frame)
    with _books:
        _blocks[block.key] = (*_blocks.get(block.key, ()), block)
    _entered.set((*[one for one in _entered.get() if one.open], block))
    return block


def close_block(block: Block) -> list[Block]:
    """It is left. Returns the open blocks that overlap it: entered later by the same generator, or, where no generator
    entered it, later in the same context and by no generator either."""
    here = _entered.get()
    with _books:
        mine = _blocks.pop(block.key)
        if len(mine) > 1:
            _blocks[block.key] = tuple([one for one in mine if one is not block])
    block.open = False
    del block.trajectory  # other contexts may still list the block, and the trajectory holds state
    _entered.set(tuple([one for one in here if one.open]))
    if block.frame is not None:
        block.frame = None
        return list(mine[mine.index(block) + 1 :])
    if block not in here:
        return []
    return [one for one in here[here.index(block) + 1 :] if one.open and one.frame is None]


def current(weights: Collection[int], frame: FrameType | None = None) -> Trajectory | None:
    """Whose call this is, for a model with one of these weights (empty: any); `frame`: where to begin on the stack.

    Raises:
        StateError: that can't be told, as generators hold trajectories open for calls that others make.
    """
    if not _blocks:
        return None
    block = _on_stack(weights, frame or sys._getframe(1)) or _in_context(weights)
    return None if block is None else block.trajectory


def innermost() -> Trajectory | None:
    """Whose call this is, whatever its model."""
    return current((), sys._getframe(1)) if _blocks else None


def _on_stack(weights: Collection[int], frame: FrameType | None) -> Block | None:
    find = _blocks.get
    while frame is not None:
        blocks = find(id(frame))
        for block in reversed(blocks) if blocks is not None else ():
            served = block.trajectory.weights
            if block.code is frame.f_code and (not served or not weights or not served.isdisjoint(weights)):
                if block.outside:
                    raise StateError(
                        "a generator that entered a trajectory calls the model, but while it was suspended other code "
                        "called the model, and those calls were counted to this trajectory. Give the other code a "
                        "trajectory of its own"
                    )
                block.inside = True
                return block
        frame = frame.f_back
    return None


def _in_context(weights: Collection[int]) -> Block | None:
    """The block entered last in this context, but for those of generators that call the model themselves and are
    suspended now."""
    found: Block | None = None
    for block in reversed(_entered.get()):
        if not block.open or not block.trajectory.serves(weights):
            continue
        if not block.is_suspended():
            if found is None:
                block.inside = True
                return block
            break
        if block.inside:
            continue
        if found is not None and found.trajectory is not block.trajectory:
            raise StateError(
                "two suspended generators have a trajectory of this model open, and neither has called the model "
                "itself: this call may belong to either. Enter a trajectory around each call of the model"
            )
        found = block
    if found is not None:
        found.outside = True
    return found
