"""LoRA fine-tuning of a chat model with TRL's SFTTrainer: Mistral-7B, Qwen2-7B and models shaped like them.

    python recipes/sft_lora.py configs/mistral.yaml
    python recipes/sft_lora.py configs/qwen2.yaml --training.learning_rate 1e-4 --lora.r 32
    python recipes/sft_lora.py configs/mistral.yaml --dry-run        everything up to training, then stop
    python recipes/sft_lora.py configs/mistral.yaml --resume         go on from the newest checkpoint

Made to be copied: `cp recipes/sft_lora.py my_run.py`, then change what you need.
"""

import sys
from pathlib import Path

from recipes.utils.command_line import first_look, training_parser

if __name__ == "__main__":  # --help and slips are answered before the imports, which take seconds
    first_look(training_parser(__doc__))

from recipes.utils.adapter import keep_start, save_adapter, train_in_float32
from recipes.utils.checkpoint import begin_from, save_whole
from recipes.utils.config import Config, parse_command_line
from recipes.utils.console import run, say
from recipes.utils.disk import check_disk
from recipes.utils.failures import settings_judged, stop_if_not_finite
from recipes.utils.fit import settle_memory
from recipes.utils.guards import check_model, check_rows, check_settings, heed
from recipes.utils.model import check_machine, check_sharded, choose_attention, load_base_model, load_tokenizer
from recipes.utils.monitor import watch
from recipes.utils.prepare import prepare
from recipes.utils.report import ReportWriter, refresh_report
from recipes.utils.run_folder import discard_empty
from recipes.utils.run_record import recorded
from recipes.utils.run_table import print_run_table
from recipes.utils.same_run import check_same_run, describe
from recipes.utils.speed import speed_up
from recipes.utils.stop import stoppable

from peft import LoraConfig, PeftModel
from trl import SFTConfig, SFTTrainer


def train_lora(config: Config) -> Path:
    """Train a LoRA adapter as `config` says and return the folder that holds it."""
    # 1. Settings: a section of the YAML holds the arguments of one library class.
    check_machine(config)
    attention, attention_reason = choose_attention(config.model, config.training["use_cpu"])
    chosen = settle_memory(config, attention)
    training_args = SFTConfig(**config.training)
    lora_config = LoraConfig(**config.lora)

    # 2. Data: JSONL files -> checked chats -> token ids, with labels on the answers alone; what cannot be right stops here.
    tokenizer, template_reason = load_tokenizer(config.model)
    train = prepare(config.data, training_args, tokenizer, "train")
    validation = prepare(config.data, training_args, tokenizer, "validation")
    findings, validation = check_rows(train, validation, config, tokenizer)
    heed(findings, config)

    # 3. Base model: frozen, in the dtype that the config names (left to itself, a model loads in float32).
    model = load_base_model(config.model, attention, training_args.use_cpu)
    heed(check_model(model, train.rows, tokenizer), config)

    # 4. Adapter: a new one, or one to go on from. Its weights are float32, whatever the base is in.
    if config.model.adapter:
        model, lora_config = PeftModel.from_pretrained(model, config.model.adapter, is_trainable=True), None

    # 5. Trainer: it packs the rows, and its fused head computes the loss without holding all logits.
    with settings_judged(config.new_folders):
        trainer = SFTTrainer(
            model=model,
            args=training_args,
            train_dataset=train.rows,
            eval_dataset=validation.rows if validation else None,
            processing_class=tokenizer,
            peft_config=lora_config,
        )
        check_sharded(trainer)
        disk = check_disk(trainer)
        made_of = describe(config, trainer, train, validation, attention)
        accepted = check_same_run(config, trainer, made_of)
    train_in_float32(trainer.model)
    chosen["speed"] = speed_up(trainer.model, config.model)
    watch(trainer, config, train, validation)
    trainer.add_callback(ReportWriter(config.run_folder))
    reasons = {
        "attention": f"{attention} ({attention_reason})",
        "chat template": template_reason,
        **chosen,
        "checkpoints": disk,
    }
    print_run_table(config, trainer, train.counts, validation.counts if validation else None, reasons)
    heed(check_settings(training_args, len(trainer.train_dataset), train.counts), config)
    if config.dry_run:
        discard_empty(config.new_folders)
        return config.run_folder

    # 6. Train, so that nothing is lost but the steps since the last checkpoint: signals, divergence and full disks end
    # the run with a whole one. The best checkpoint by validation loss is loaded at the end.
    save_whole(trainer, made_of)
    begin_from(trainer, config.resume, accepted)
    stop_if_not_finite(trainer, train, validation)
    start = keep_start(trainer.model, config.model.revision)
    with recorded(config, trainer, train, validation, accepted) as results, stoppable(trainer, config.max_hours):
        results["train"] = trainer.train(resume_from_checkpoint=config.resume).metrics

        # 7. Save the adapter with the tokenizer and the chat template that it was trained with.
        save_adapter(trainer, start)
        results["best_validation_loss"] = trainer.state.best_metric
    say(f"\nadapter: {config.run_folder}\nreport:  {refresh_report(config.run_folder)}")
    say(f"next:    python recipes/evaluate_adapter.py {config.run_folder}")
    return config.run_folder


def main(argv: list[str]) -> None:
    train_lora(parse_command_line(argv, method="lora", description=__doc__))


if __name__ == "__main__":
    sys.exit(run(main))
