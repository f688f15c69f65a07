"""Where generated rows end, and which of them continue.

Shape suffixes: B rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from phatgoose.base import Base
from phatgoose.inference.forward_context import ForwardContext

# Rows leave a batch if that can save so many steps of its whole.
_STEPS = 4


class Ending:
    """Where generated rows end, and the text of what was written before.

    Args:
        base: its end tokens are the one that experts are trained with, and its other ones.
        stops: as for `generate`.
        spaces: of each row, as for `generate`.
    """

    def __init__(self, base: Base, stops: Sequence[str], spaces: Sequence[int]) -> None:
        self._tokenizer, self._spaces = base.tokenizer, spaces
        self.stops = [stop for stop in stops if stop]
        # More than `all_special_tokens`, which are those that have a role.
        added = base.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        self._special = [stop for stop in self.stops if any(name in stop for name in special)]
        own = base.model.generation_config.eos_token_id
        others = own if isinstance(own, list) else [own]
        self.tokens = sorted({base.tokenizer.eos_token_id, *others} - {None})
        self._completing: dict[int, bool] = {}
        self._before = list(base.tokenizer("a", add_special_tokens=False)["input_ids"])
        self._start = len(self._decode(self._before))

    def is_reached(self, row: int, ids: list[int]) -> bool:
        """Return whether the text of a row contains a stop string, and did not before its last id.

        Only a token whose text has the last character of a stop string can complete one, so others
        need no look at what came before.
        """
        if not self.stops or not self._may_complete(ids[-1]):
            return False
        text = self._own(row, self._decode(ids))
        return any(stop in text for stop in self.stops)

    def _may_complete(self, token: int) -> bool:
        if self._tokenizer.clean_up_tokenization_spaces:
            return True  # a token may change the text before it
        if token not in self._completing:
            # Behind another token: the space before a text's first word is not always decoded. A
            # part of a character may complete any character.
            text = self._decode([*self._before, token])
            self._completing[token] = "\ufffd" in text or any(
                stop[-1] in text[self._start :] for stop in self.stops
            )
        return self._completing[token]

    def text(self, row: int, ids: list[int]) -> str:
        """Return what a row wrote before its first stop string, without special tokens."""
        ids = ids[:-1] if ids and ids[-1] in self.tokens else ids
        rest = ""
        for stop in self._special:  # these are not in the text any more
            raw = self._decode(ids)
            at = raw.find(stop, len(raw) - len(self._own(row, raw)))
            if at >= 0:
                while len(self._decode(ids)) > at:
                    ids = ids[:-1]
                rest = raw[len(self._decode(ids)) : at]  # the beginning of a token
        text = self._own(row, self._decode(ids, special=False) + rest)
        # As lm-evaluation-harness, one after the other; the end may be written in letters.
        for stop in [*self.stops, self._tokenizer.eos_token]:
            text = text.split(stop)[0]
        return text

    def _decode(self, ids: list[int], *, special: bool = True) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=not special))

    def _own(self, row: int, text: str) -> str:
        """Return a text without the spaces that its prompt ends with."""
        written = len(text) - len(text.lstrip(" "))
        return text[min(written, self._spaces[row]) :]


class Stopping(StoppingCriteria):
    """Ends rows at an end token or a stop string; announces which rows continue.

    Args:
        ending: where a row ends.
        forward: where to announce.
        rows: of the batch.
        most: the most tokens of a row.
        counts: whether written tokens count; if not, they are announced as padding.
        compacts: whether a call of `generate` may end for rows to leave the batch.

    Attributes:
        written: the tokens of each row so far, its end included.
        left: how many tokens the rows that have not ended may still write; 0 once all have ended.
    """

    def __init__(
        self,
        ending: Ending,
        forward: ForwardContext,
        *,
        rows: int,
        most: int,
        counts: bool,
        compacts: bool,
    ) -> None:
        self._ending, self._forward = ending, forward
        self._counts, self._compacts = counts, compacts
        self.written: list[list[int]] = [[] for _ in range(rows)]
        self.left = most
        self._rows = list(range(rows))  # those of the current call of `generate`
        self._done = [False] * rows  # of the current rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Return which rows have ended, bool [B], after each new token."""
        for place, token in enumerate(input_ids[:, -1].tolist()):
            if not self._done[place]:
                row = self._rows[place]
                self.written[row].append(token)
                self._done[place] = token in self._ending.tokens or self._ending.is_reached(
                    row, self.written[row]
                )
        alive = self._done.count(False)
        self.left = self.left - 1 if alive else 0
        self._announce(input_ids.device)
        # Leaving takes about as long as a step, and saves at most one for each row and token left.
        saved = (len(self._rows) - alive) * self.left
        leave = self._compacts and saved >= _STEPS * len(self._rows)
        return torch.tensor([leave or done for done in self._done], device=input_ids.device)

    def compact(self, device: torch.device) -> list[int]:
        """Forget the rows that have ended; return the others' places among the current rows."""
        places = [place for place, done in enumerate(self._done) if not done] if self.left else []
        self._rows = [self._rows[place] for place in places]
        self._done = [False] * len(places)
        if places:
            self._announce(device)
        return places

    def _announce(self, device: torch.device) -> None:
        counts_B = torch.tensor([self._counts and not done for done in self._done], device=device)
        rows_B = torch.tensor(self._rows, device=device)
        self._forward.announce("decoder", counts_B.unsqueeze(1), rows_B.unsqueeze(1))
