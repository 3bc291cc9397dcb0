"""An exported folder in its own runtime: as a session that gives logits, and through that runtime's generator."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from export.artefact import ArtefactError, Format
from export.builders import RUNTIME_OF_FORMAT
from hw_profiles.runtimes import Session, runtime

#: That a session has room for, unless asked for more.
MAX_TOKENS = 1024


def open_session(directory: Path, format_: Format, threads: int, max_tokens: int = MAX_TOKENS) -> Session:
    """The folder as a session of its own runtime; a Hugging Face folder runs in torch."""
    try:
        if format_ == "huggingface":
            return TorchSession(directory, threads)
        return runtime(RUNTIME_OF_FORMAT[format_]).load(directory, threads, max_tokens)
    except ImportError:
        raise
    except Exception as error:  # what the loaders raise shares no base class but Exception
        raise not_working(directory, "load", error) from error


def not_working(directory: Path, what: str, error: Exception) -> ArtefactError:
    """What to raise where a folder does not `what`."""
    return ArtefactError(f"{directory} does not {what} ({' '.join(str(error).split())}); export again")


def generate(directory: Path, format_: Format, threads: int, prompt: str, new_tokens: int) -> str:
    """Greedy continuation of a prompt through the runtime's own generator, onnxruntime's being a plain loop.

    Raises ArtefactError where the folder's tokenizer or generator does not work.
    """
    try:
        return _generate(directory, format_, threads, prompt, new_tokens)
    except (ImportError, ArtefactError):
        raise
    except Exception as error:  # what tokenizers and openvino_genai raise shares no base class but Exception
        raise not_working(directory, "generate", error) from error


def _generate(directory: Path, format_: Format, threads: int, prompt: str, new_tokens: int) -> str:
    if format_ == "openvino":
        return _generate_openvino(directory, threads, prompt, new_tokens)
    if format_ == "gguf":
        return _generate_llamacpp(directory, threads, prompt, new_tokens)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    session = open_session(directory, format_, threads)
    if isinstance(session, TorchSession):
        output = session.model.generate(ids, max_new_tokens=new_tokens, do_sample=False)[0, ids.shape[1] :].tolist()
    else:
        output, next_ids = [], ids.numpy()
        while len(output) < new_tokens and (not output or output[-1] != tokenizer.eos_token_id):
            output.append(int(session.step(next_ids)[0].argmax()))
            next_ids = np.array([[output[-1]]], np.int64)
    return str(tokenizer.decode(output, skip_special_tokens=True))


class TorchSession:
    """A Hugging Face folder as a `Session`, with transformers' KV cache. Runs our own code, never the folder's."""

    def __init__(self, directory: Path, threads: int) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from export.huggingface import register

        register()
        logging.disable_progress_bar()  # of a second's work
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
        ).eval()
        self._cache = None

    def reset(self, batch_size: int = 1, past_tokens: int = 0, new_tokens: int | None = None) -> None:
        self._cache = None
        if past_tokens:
            self.step(np.zeros((batch_size, past_tokens), np.int64))

    @torch.inference_mode()
    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        output = self.model(
            input_ids=torch.from_numpy(np.array(token_ids)),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        logits: NDArray[np.float32] = output.logits[:, -1].numpy()
        return logits


def _generate_openvino(directory: Path, threads: int, prompt: str, new_tokens: int) -> str:
    import openvino as ov
    import openvino_genai

    from hw_profiles.runtimes.openvino import MODEL_FILE, arithmetic, compile_properties

    asked = arithmetic(ov.Core().read_model(directory / MODEL_FILE))
    pipeline = openvino_genai.LLMPipeline(str(directory), "CPU", **compile_properties(threads, asked))
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = new_tokens
    config.do_sample = False
    config.apply_chat_template = False
    config.set_eos_token_id(pipeline.get_tokenizer().get_eos_token_id())
    return str(pipeline.generate(prompt, config))


def _generate_llamacpp(directory: Path, threads: int, prompt: str, new_tokens: int) -> str:
    import llama_cpp

    from hw_profiles.runtimes.llamacpp import MODEL_FILE

    # its default cache, of f16, changes tokens where two are nearly as likely
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(directory / MODEL_FILE), n_ctx=MAX_TOKENS, n_threads=threads, type_k=f32, type_v=f32, verbose=False
    )
    vocabulary, ids, output = llama_cpp.llama_model_get_vocab(model.model), model.tokenize(prompt.encode()), []
    for token in islice(model.generate(ids, temp=0), new_tokens):
        if llama_cpp.llama_vocab_is_eog(vocabulary, token):
            break
        output.append(token)
    return str(model.detokenize(output, prev_tokens=ids).decode(errors="replace"))
