"""Finds the open `with trajectory:` block that a call of a model belongs to.

A call belongs to the block that was entered last by a function on its stack. So a generator has its own trajectory,
whichever thread or context resumes it. Where no such function runs, the context decides (a thread, a task, or what
inherits its context). The context serves child threads and tasks, and blocks that helpers enter and leave by hand.
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
_HELPERS = {"__enter__", "__aenter__", "enter_context", "__exit__", "__aexit__"}  # these enter a block for their caller

_lock = threading.RLock()  # protects `_blocks`; a generator that is collected may leave its block at any moment
_blocks: dict[int, tuple[Block, ...]] = {}  # open blocks, by id of the frame that entered them
# blocks entered in this thread or task, the latest last; a block that was left in another context stays here, closed
_entered: ContextVar[tuple[Block, ...]] = ContextVar("moeca_trajectories", default=())


class Block:
    """One `with trajectory:` between enter and exit.

    Attributes:
        trajectory: the one that was entered.
        key: id of the frame that entered it.
        code: of that frame.
        frame: that frame, if it is a generator's; else None, for a reference would keep a finished function's frame.
        open: the block wasn't left yet.
        inside: calls came from the function that entered it, or from a child thread or task of that function.
        outside: calls came from other code while the generator was suspended.
    """

    __slots__ = ("code", "frame", "inside", "key", "open", "outside", "trajectory")

    def __init__(self, trajectory: Trajectory, frame: FrameType) -> None:
        self.trajectory, self.key, self.code = trajectory, id(frame), frame.f_code
        self.frame = frame if frame.f_code.co_flags & _GENERATOR else None
        self.open, self.inside, self.outside = True, False, False

    def is_suspended(self) -> bool:
        """Whether a generator entered the block and now waits at a `yield`, so that calls come from other code. For a
        generator that waits at an `await`, calls come from its child threads and tasks."""
        if self.frame is None or self.frame.f_back is not None:
            return False
        code, after = self.frame.f_code.co_code, self.frame.f_lasti + 2
        return code[after : after + 1] == bytes([_RESUME]) and code[after + 1] & 3 in _AFTER_YIELD

    def is_in_context(self) -> bool:
        """Whether the block was entered in this context, or in one that this context inherits."""
        return self in _entered.get()

    def holds(self, frame: FrameType) -> bool:
        """Whether code in `frame` runs inside the block, so that it may enter the trajectory again."""
        caller: FrameType | None = frame
        while caller is not None:
            if id(caller) == self.key and caller.f_code is self.code:
                return True
            caller = caller.f_back
        return self.is_in_context() and not (self.inside and self.is_suspended())


def acting(frame: FrameType) -> FrameType:
    """The function that a block belongs to: skips each `__enter__` that passes on, and the generator of a
    `contextmanager`."""
    while frame.f_back is not None:
        code = frame.f_code
        passes_on = code.co_name in _HELPERS
        if not passes_on and not (code.co_flags & _GENERATOR and frame.f_back.f_code.co_name in _HELPERS):
            break
        frame = frame.f_back
    return frame


def open_block(trajectory: Trajectory, frame: FrameType) -> Block:
    """Open a block for `frame` (see `acting`)."""
    block = Block(trajectory, frame)
    with _lock:
        _blocks[block.key] = (*_blocks.get(block.key, ()), block)
    _entered.set((*[entered for entered in _entered.get() if entered.open], block))
    return block


def close_block(block: Block) -> list[Block]:
    """Close a block.

    Returns:
        The open blocks that overlap it. For a generator's block: those that the same generator entered later. For any
        other block: those entered later in the same context and not by a generator.
    """
    in_context = _entered.get()
    with _lock:
        of_frame = _blocks.pop(block.key)
        if len(of_frame) > 1:
            _blocks[block.key] = tuple([other for other in of_frame if other is not block])
    block.open = False
    del block.trajectory  # other contexts may still list the block, and the trajectory holds state
    _entered.set(tuple([other for other in in_context if other.open]))
    if block.frame is not None:
        block.frame = None
        return list(of_frame[of_frame.index(block) + 1 :])
    if block not in in_context:
        return []
    later = in_context[in_context.index(block) + 1 :]
    return [other for other in later if other.open and other.frame is None]


def current(weights: Collection[int], frame: FrameType | None = None) -> Trajectory | None:
    """The trajectory that a call belongs to.

    Args:
        weights: ids of the called model's weights; empty: any model.
        frame: where to begin on the stack; default: the caller.

    Returns:
        None: the call is in no trajectory.

    Raises:
        StateError: several suspended generators have a trajectory of the model open, so the call can't be assigned.
    """
    if not _blocks:
        return None
    block = _on_stack(weights, frame or sys._getframe(1)) or _in_context(weights)
    return None if block is None else block.trajectory


def innermost() -> Trajectory | None:
    """The trajectory that a call belongs to, for any model."""
    return current((), sys._getframe(1)) if _blocks else None


def _on_stack(weights: Collection[int], frame: FrameType | None) -> Block | None:
    """The block that a function on the stack entered last."""
    blocks_of = _blocks.get
    while frame is not None:
        blocks = blocks_of(id(frame))
        for block in reversed(blocks) if blocks is not None else ():
            its_weights = block.trajectory.weights  # `serves`, written out: one call less in each step
            if block.code is frame.f_code and (not its_weights or not weights or not its_weights.isdisjoint(weights)):
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
    """The block entered last in this context, except blocks of suspended generators that call the model themselves."""
    suspended: Block | None = None
    for block in reversed(_entered.get()):
        if not block.open or not block.trajectory.serves(weights):
            continue
        if not block.is_suspended():
            if suspended is None:
                block.inside = True
                return block
            break
        if block.inside:
            continue
        if suspended is not None and suspended.trajectory is not block.trajectory:
            raise StateError(
                "two suspended generators have a trajectory of this model open, and neither has called the model "
                "itself: this call may belong to either. Enter a trajectory around each call of the model"
            )
        suspended = block
    if suspended is not None:
        suspended.outside = True
    return suspended
