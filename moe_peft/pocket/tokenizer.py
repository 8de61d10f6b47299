"""
The pocket backbone's tokenizer: one token per character, 100 tokens in all, no special token added on its own.

Token ids are the order of `CHARACTERS` after the four special tokens: `<pad>` 0, `<bos>` 1, `<eos>` 2, `<unk>` 3.
The chat template writes the turns one after the other with nothing between them but the end-of-text that closes each
assistant turn, so a conversation of one question reads exactly as a pre-training document does.
"""

import string
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "\n" + "".join(sorted(set(string.printable) - set(string.whitespace) | {" "}))

# Each turn depends on itself alone, which makes the rendering prefix-preserving. The `generation` markers tell TRL's
# `assistant_only_loss` what was said by the assistant; `<eos>` is inside them, for the model must learn to stop.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ message['content'] + eos_token }}{%- endgeneration -%}"
    "{%- else -%}"
    "{{ message['content'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """Build the tokenizer; `save_pretrained` makes it loadable by `AutoTokenizer` without this module."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )
