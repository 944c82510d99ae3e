"""Recognise configuration files of other trainers, and name the keys that they need here. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from obsfs.plugin import UsageError, visible

_TOOLS: Mapping[str, Mapping[str, str]] = {
    "axolotl": {
        "base_model": "model",
        "base_model_config": "",
        "model_type": "",
        "tokenizer_type": "",
        "tokenizer_config": "",
        "datasets": "data",
        "test_datasets": "eval_data",
        "pretraining_dataset": "data, with streaming: true",
        "dataset_prepared_path": "",
        "dataset_processes": "dataset_num_proc",
        "val_set_size": "test_split_size",
        "adapter": "method",
        "rl": "task",
        "rl_beta": "beta",
        "lora_model_dir": "",
        "lora_target_linear": "target_modules: all-linear",
        "lora_fan_in_fan_out": "fan_in_fan_out",
        "peft_use_dora": "method: dora",
        "peft_use_rslora": "use_rslora",
        "peft_layers_to_transform": "layers_to_transform",
        "sequence_len": "max_length",
        "sample_packing": "packing",
        "eval_sample_packing": "eval_packing",
        "pad_to_sequence_len": "",
        "micro_batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "num_epochs": "num_train_epochs",
        "optimizer": "optim",
        "lr_scheduler": "lr_scheduler_type",
        "evals_per_epoch": "eval_steps",
        "saves_per_epoch": "save_steps",
        "train_on_inputs": "completion_only_loss",
        "flash_attention": "attn_implementation: flash_attention_2",
        "sdp_attention": "attn_implementation: sdpa",
        "xformers_attention": "attn_implementation",
        "chat_template": "chat_template_path",
        "chat_template_jinja": "chat_template_path",
        "special_tokens": "eos_token and pad_token",
        "wandb_project": "report_to: wandb, with project",
        "wandb_entity": "",
        "wandb_watch": "",
        "wandb_name": "run_name",
        "wandb_run_id": "",
        "wandb_log_model": "",
        "mlflow_tracking_uri": "report_to: mlflow",
        "plugins": "",
        "strict": "",
        "gpu_memory_limit": "",
        "group_by_length": "train_sampling_strategy: group_by_length",
        "early_stopping_patience": "",
        "auto_resume_from_checkpoints": "resume",
        "torch_dtype": "dtype",
    },
    "LLaMA-Factory": {
        "stage": "task",
        "finetuning_type": "method",
        "template": "chat_template_path",
        "dataset_dir": "data",
        "eval_dataset": "eval_data",
        "cutoff_len": "max_length",
        "max_samples": "",
        "overwrite_cache": "",
        "overwrite_output_dir": "",
        "preprocessing_num_workers": "dataset_num_proc",
        "tokenized_path": "",
        "lora_rank": "lora_r",
        "lora_target": "target_modules",
        "additional_target": "modules_to_save",
        "quantization_bit": "method: qlora",
        "quantization_method": "",
        "double_quantization": "bnb_4bit_use_double_quant",
        "val_size": "test_split_size",
        "pref_beta": "beta",
        "pref_loss": "loss_type",
        "plot_loss": "",
        "flash_attn": "attn_implementation",
        "adapter_name_or_path": "",
        "create_new_adapter": "",
        "export_dir": "",
        "mix_strategy": "",
        "interleave_probs": "",
        "train_on_prompt": "completion_only_loss",
        "mask_history": "",
        "neat_packing": "packing",
        "rope_scaling": "",
        "enable_liger_kernel": "use_liger_kernel",
        "use_unsloth": "",
        "freeze_trainable_layers": "",
        "pure_bf16": "bf16",
        "upcast_layernorm": "",
        "loraplus_lr_ratio": "",
        "ref_model": "",
        "image_max_pixels": "",
        "video_max_pixels": "",
    },
    "ms-swift": {
        "train_type": "method",
        "tuner_type": "method",
        "tuner_backend": "",
        "sft_type": "method",
        "rlhf_type": "task",
        "model_id_or_path": "model",
        "model_revision": "",
        "val_dataset": "eval_data",
        "split_dataset_ratio": "test_split_size",
        "dataset_test_ratio": "test_split_size",
        "lora_rank": "lora_r",
        "quant_bits": "method: qlora",
        "quant_method": "",
        "torch_dtype": "dtype",
        "attn_impl": "attn_implementation",
        "template": "chat_template_path",
        "template_type": "chat_template_path",
        "system": "",
        "model_author": "",
        "model_name": "",
        "model_type": "",
        "use_hf": "",
        "batch_size": "per_device_train_batch_size",
        "truncation_strategy": "truncation_mode",
        "freeze_vit": "",
        "freeze_llm": "",
        "freeze_aligner": "",
        "loss_scale": "",
        "lazy_tokenize": "",
        "load_args": "",
        "agent_template": "",
        "max_pixels": "",
        "resume_only_model": "",
    },
    "TRL": {
        "use_peft": "method: lora",
        "dataset_config": "",
        "dataset_test_split": "eval_data",
        "datasets": "data",
        "model_revision": "",
        "torch_dtype": "dtype",
        "lora_use_rslora": "use_rslora",
        "reward_model_path": "",
        "script_args": "",
    },
}
"""Keys of other trainers that are unknown here, each with its name here; empty if there is no equivalent."""


def refuse_other_trainers(given: Collection[str], unknown: Collection[str]) -> None:
    """Raise UsageError, with the names used here, if unknown keys are those of another trainer.

    Args:
        given: All keys of the file.
        unknown: Those that are unknown here.
    """
    tool = max(_TOOLS, key=lambda one: len(_TOOLS[one].keys() & set(unknown)))
    names = _TOOLS[tool]
    known = [name for name in unknown if name in names]
    if not known:
        return
    here = [f"{name} is {names[name]} here" for name in known if names[name]]
    if "output_dir" in given and "output" not in given:
        here.append("output_dir is output here")
    without = [visible(name, 80) for name in unknown if not names.get(name)]
    parts = [*here, *([f"leave out {', '.join(without)}"] if without else [])]
    raise UsageError(f"{', '.join(known)}: keys of {tool}", "; ".join(parts))
