"""LoRA fine-tuning of a chat model with TRL's SFTTrainer: Mistral-7B, Qwen2-7B and models shaped like them.

    python recipes/sft_lora.py configs/mistral.yaml
    python recipes/sft_lora.py configs/qwen2.yaml --training.learning_rate 1e-4 --lora.r 32
    python recipes/sft_lora.py configs/mistral.yaml --dry-run        everything up to training, then stop
    python recipes/sft_lora.py configs/mistral.yaml --resume         go on from the newest checkpoint

Made to be copied: `cp recipes/sft_lora.py my_run.py`, then change what you need.
"""

import sys
from pathlib import Path

from recipes.utils.console import CommandLine, command, first_look, run_main, say, training_parser

if __name__ == "__main__":
    given = first_look(training_parser(__doc__))  # --help and slips are answered before the imports, which take seconds

from peft import LoraConfig
from trl import SFTConfig

from recipes.utils.config import Config, read_config
from recipes.utils.data import load_tokenizer, prepare
from recipes.utils.model import choose_attention, fast_lora, load_base, load_onto, prepare_adapter, save_adapter
from recipes.utils.monitoring import Ledger, Progress, Report, Samples, Trackers
from recipes.utils.training import Deadline, EarlyStopping, ResumableTrainer, begin, check_same_run, print_run, recorded


def train_lora(config: Config) -> Path:
    """Train a LoRA adapter as `config` says and return the folder that holds it."""
    # The run's folder, locked until the end; the folder of its base, from the hub if need be; what to resume from.
    with begin(config) as run:
        # 1. Settings: a section of the YAML holds the arguments of one library class.
        args = SFTConfig(output_dir=str(run.folder), **config.training)
        lora_config = fast_lora(LoraConfig(**config.lora), config.model)

        # 2. Data: JSONL files -> checked chats -> token ids, labels on answers alone. What cannot be right stops here.
        trusted, adapter = config.model.trust_remote_code, config.model.adapter
        tokenizer = load_tokenizer(run.base, config.model.chat_template, trusted, adapter)
        train, validation = prepare(config.data, tokenizer, args)

        # 3. Base model: frozen, in the dtype that the config names (left to itself, a model loads in float32).
        attention = choose_attention(run.base, config.model, args.use_cpu, bool(config.training.get("packing")))
        model = load_base(run.base, config.model, attention, use_cpu=args.use_cpu)

        # 4. Adapter: a new one, which the trainer makes of `lora_config`, or one to go on from, with its own settings.
        if adapter:
            lora_config = fast_lora(LoraConfig.from_pretrained(adapter), config.model)
            model, lora_config = load_onto(model, adapter, lora_config), None

        # 5. Trainer: TRL's SFTTrainer, which packs the rows and whose fused head computes the loss without holding all
        # logits. Another loss: override `compute_loss` in a subclass, as docs/make_it_yours.md shows. ResumableTrainer
        # adds checkpoints that are complete or absent, a stop at signals, and the names of rows that make a loss NaN.
        report = Report(run.folder)
        trainer = ResumableTrainer(
            model=model,
            args=args,
            train_dataset=train.rows,
            eval_dataset=validation.rows if validation else None,
            processing_class=tokenizer,
            peft_config=lora_config,
            callbacks=[  # what watches; leave out what you do not want
                Progress(run.folder),
                Ledger(run.folder, train.rows, config.data.ledger),
                Samples(run.folder, validation, tokenizer, config.data.samples),
                Trackers(config.trackers, run.folder),
                EarlyStopping(config.run.early_stopping_patience),
                Deadline(config.max_hours),
                report,
            ],
        )
        prepare_adapter(trainer.model, config.model)  # in float32, whatever the trainer has made of it
        check_same_run(run, config, trainer, train, validation)  # a resume of something else is refused, by the setting
        print_run(run, config, trainer, train, validation)  # the table, worked out, and what is unwise
        if config.dry_run:
            return run.folder

        # 6. Train. However it ends, run.json says how, with the `results`, the report is written a last time, and no
        # step is lost but those since the last checkpoint.
        with report, recorded(run, config, trainer, train, validation) as results:
            results["train"] = trainer.train(resume_from_checkpoint=run.checkpoint).metrics

            # 7. Save the best adapter by validation loss, with the tokenizer and the chat template of its training.
            save_adapter(trainer, run.folder)
    say(f"\nadapter: {run.folder}\nreport:  {report.path}")
    say(f"next:    {command('evaluate_adapter', run.folder)}")
    return run.folder


def main(given: CommandLine) -> None:
    train_lora(read_config(given, method="lora"))


if __name__ == "__main__":
    sys.exit(run_main(main, given))
