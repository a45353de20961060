"""Episodes under way: what acting needs besides the weights, kept over a cut of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdreamer.agent import Carry
from fastdreamer.envs import StateError, VectorEnv
from fastdreamer.rssm import State

Rows = dict[str, np.ndarray]


@dataclass
class Episodes:
    """Where N environments stand between two steps of a run."""

    returns: np.ndarray
    """Rewards of the episode so far, float64 (N,)."""
    lengths: np.ndarray
    """Steps of the episode so far, int (N,)."""
    rows: Rows | None = None
    """What the environments showed last, (N, ...); None before a reset and after a failure."""
    carry: Carry | None = None
    """What the policy remembers; None until it has acted."""

    @classmethod
    def none(cls, count: int) -> Episodes:
        """Before the first reset of ``count`` environments."""
        return cls(np.zeros(count), np.zeros(count, int))

    def track(self, rows: Rows) -> Iterator[tuple[int, float, int]]:
        """Take the environments' next rows; which episodes ended, each with score and length."""
        self.rows = rows
        self.returns += rows["reward"]
        self.lengths += ~rows["is_first"]
        for i in np.flatnonzero(rows["is_last"]):
            score, length = float(self.returns[i]), int(self.lengths[i])
            self.returns[i] = self.lengths[i] = 0
            yield int(i), score, length

    def state_dict(self, envs: VectorEnv) -> dict[str, Any]:
        """These episodes and their environments, or only the reason why there is no such state."""
        if self.rows is None:
            return {"reason": "an environment failed"}
        try:
            data = envs.get_state()
        except StateError as error:
            return {"reason": str(error)}
        carry = self.carry
        return {
            # Bytes as a tensor: whoever loads the checkpoint does not unpickle them by that.
            "envs": torch.frombuffer(bytearray(data), dtype=torch.uint8),
            "rows": {k: torch.from_numpy(v) for k, v in self.rows.items()},
            "carry": carry and [carry.state.deter, carry.state.stoch, carry.action],
            "returns": torch.from_numpy(self.returns),
            "lengths": torch.from_numpy(self.lengths),
        }

    def load_state_dict(self, state: Mapping[str, Any], envs: VectorEnv) -> None:
        """Go on in the middle of the saved episodes, in ``envs`` made as before.

        Raises:
            StateError: they cannot be restored; nothing is changed.
        """
        if "envs" not in state:
            raise StateError(state["reason"])
        envs.set_state(state["envs"].cpu().numpy().tobytes())
        self.rows = {k: v.cpu().numpy() for k, v in state["rows"].items()}
        if state["carry"] is not None:
            deter, stoch, action = state["carry"]
            self.carry = Carry(State(deter, stoch), action)
        self.returns = state["returns"].cpu().numpy()
        self.lengths = state["lengths"].cpu().numpy()
