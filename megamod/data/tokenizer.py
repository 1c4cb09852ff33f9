"""The tokenizer and chat template of a checkpoint: transformers', behind the three things that training asks of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from megamod.data.jsonl import Message
from megamod.errors import MegamodError
from megamod.weights import checksums


class Encoded(NamedTuple):
    """Text as `t` tokens, and where in the text each one lies."""

    ids: npt.NDArray[np.int32]  # [t]
    offsets: npt.NDArray[np.int64]  # [t, 2]: first and last + 1 of its characters


class Tokenizer:
    """Renders conversations and encodes text, exactly as transformers' `apply_chat_template` does.

    Templates run in jinja2's sandbox, which is transformers' own; no code of the checkpoint runs, and nothing is fetched.

    Args:
        path: a Hugging Face directory: tokenizer.json, or a SentencePiece tokenizer.model, and tokenizer_config.json.
        template: a chat template (Jinja) to use instead of the checkpoint's own.
        arguments: what the template asks for, such as `enable_thinking`.

    Attributes:
        end: the id of the token that ends a turn (`eos_token`).
        template: the Jinja text in use.
        special: the special tokens' texts. In a message they are read as tokens, by transformers as by vLLM: a text that holds one
            can end its own turn.

    Raises:
        MegamodError: no tokenizer there, or one without a chat template, end token or offsets; small files that are not as their
            checksums say.
    """

    def __init__(self, path: str | Path, template: str | None = None, arguments: Mapping[str, Any] | None = None) -> None:
        self.path = str(path)
        if not Path(path).is_dir():
            raise MegamodError(f"{path}: no such directory; a Hugging Face directory with a tokenizer was expected")
        checksums.verify(path, wanted=checksums.is_small)
        try:
            self._backend = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its parsers raise
            raise MegamodError(f"{path}: no tokenizer that can be read ({_first_line(error)}): tokenizer.json was expected") from None
        if not self._backend.is_fast:
            raise MegamodError(f"{path}: a tokenizer that cannot say where its tokens lie in the text: save it as tokenizer.json")
        self.template = template if template is not None else self._backend.chat_template
        if not isinstance(self.template, str):
            raise MegamodError(f"{path}: the tokenizer has no chat template: name one with data.chat.template")
        if self._backend.eos_token_id is None:
            raise MegamodError(f"{path}: the tokenizer has no end token: set eos_token in tokenizer_config.json")
        self.end: int = self._backend.eos_token_id
        self.end_text: str = self._backend.eos_token
        added = (token.content for token in self._backend.added_tokens_decoder.values() if token.special)
        self.special = tuple(sorted({*added, *self._backend.all_special_tokens}))
        self.arguments = dict(arguments or {})

    def __len__(self) -> int:
        """How many ids there are; the model's vocabulary may be larger."""
        return len(self._backend)

    def render(self, messages: Sequence[Message], *, prompt: bool, where: str) -> str:
        """The conversation as text; with `prompt` followed by what introduces the assistant's next turn.

        Raises:
            MegamodError: the template fails on these messages; the line begins with `where`.
        """
        try:
            text: str = self._backend.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=prompt, chat_template=self.template,
                **self.arguments,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise MegamodError(f"{where}: the chat template fails on this conversation: {_first_line(error)}") from None
        return text

    def encode(self, text: str) -> Encoded:
        """`text`, special tokens written out in it included, as ids; none are added."""
        # verbose: it would warn of texts longer than it was made for; rows are measured against the packed row instead.
        found = self._backend(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return Encoded(np.array(found["input_ids"], np.int32), np.array(found["offset_mapping"], np.int64).reshape(-1, 2))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens written out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of what decides the ids of a conversation: vocabulary, merges, template and its arguments."""
        digest = hashlib.sha256(self._backend.backend_tokenizer.to_str().encode())
        digest.update(json.dumps([self.template, self.end, self.arguments], sort_keys=True, default=str).encode())
        return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
