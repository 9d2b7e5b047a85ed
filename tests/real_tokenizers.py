"""Two kinds of real tokenizer, trained on a few sentences, and rows for them."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cdpo.batch import Pair
from cdpo.data.rows import Row

TEXT = ["hello world", "hello there, world", "is the world well?", " hello", "\n\nHuman: hello\n\nAssistant:"] * 50
EOS = 0


def byte_level():
    """Like GPT-2: bytes, no BOS added, one token for bos, eos and pad."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    known = {"special_tokens": ["<end>"], "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet())}
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, **known)
    model.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<end>", eos_token="<end>", pad_token="<end>")


def metaspace():
    """Like Llama 2: a space mark before every word, also the first, and a BOS before the text."""
    model = Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    model.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["</s>", "<s>", "<unk>"]
    model.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False))
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte_level": byte_level(), "metaspace": metaspace()}


def raw(tokenizer, text):
    """The ids of the tokenizers library itself, no special token added."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def row(prompt="hello", chosen=" world", rejected=" there", source="a:1", **options):
    return Row(source, prompt, [chosen, rejected], [Pair(0, 1)], **options)
