"""What vLLM writes after some prompts: run by `vllm.py`, in vLLM's environment.

    python -P vllm_generate.py CHECKPOINT PROMPTS.json NEW_TOKENS RESULT.json

With -P, or `import vllm` finds the script beside this one.
"""

import json
import sys
from pathlib import Path

import torch
from vllm import LLM, SamplingParams, __version__


def main() -> None:
    checkpoint, prompts, new_tokens, result = sys.argv[1:]
    model = LLM(checkpoint, enforce_eager=True, dtype="float32", max_model_len=64)
    # Greedy, and on after the end of a text: as many tokens for every prompt.
    greedy = SamplingParams(
        temperature=0, max_tokens=int(new_tokens), ignore_eos=True, logprobs=1, detokenize=False
    )
    ids = json.loads(Path(prompts).read_text())
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in ids], greedy)
    written = [output.outputs[0] for output in outputs]
    content = {
        "tokens": [list(text.token_ids) for text in written],
        "logprobs": [
            [position[token].logprob for token, position in zip(*pair, strict=True)]
            for pair in ((text.token_ids, text.logprobs) for text in written)
        ],
        "versions": {"vllm": __version__, "torch": torch.__version__},
    }
    Path(result).write_text(json.dumps(content))


# The engine is a process of its own, which imports this file first.
if __name__ == "__main__":
    main()
