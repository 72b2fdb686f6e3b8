"""One PPO iteration of TRL at each line on standard input; a line of JSON after it. For bench_ppo.py, which starts this
file with the Python of an environment that has trl==1.12.0 (the last release with a PPO trainer). It imports nothing of
ppomax.

    python tools/bench_trl.py FOLDER PROMPTS PROMPT_TOKENS NEW_TOKENS MINIBATCHES THREADS exact|eos
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)


class Turns(TrainerCallback):
    """Waits for a line before each iteration, and tells what it took."""

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        self._wait()

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        print(json.dumps({"seconds": time.perf_counter() - self._start}), flush=True)
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self._start = time.perf_counter()


def main() -> None:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    folder = Path(sys.argv[1])
    prompts, prompt_tokens, new_tokens, minibatches, threads = map(int, sys.argv[2:7])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ends = sys.argv[7] == "eos"
    settings = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=prompts,
        gradient_accumulation_steps=1,
        num_mini_batches=minibatches,
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=prompts,
        response_length=new_tokens,
        stop_token="eos" if ends else None,
        temperature=1.0,
        total_episodes=1_000_000 * prompts,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    language = [AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2)]
    for model in language:
        model.generation_config.eos_token_id = model.config.eos_token_id if ends else None
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(folder / name, num_labels=1) for name in ("reward", "critic")
    )
    words = torch.randint(3, language[0].config.vocab_size, (4 * prompts, prompt_tokens)).tolist()
    trainer = PPOTrainer(
        args=settings,
        processing_class=AutoTokenizer.from_pretrained(folder / "policy", padding_side="left"),
        model=language[0],
        ref_model=language[1],
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": words}),
        eval_dataset=Dataset.from_dict({"input_ids": words[:prompts]}),
        callbacks=[Turns()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
