"""A model with its adapter merged into it, loadable anywhere: `python -m dpo.merge ADAPTER OUTPUT_DIR`."""

import argparse
import sys
from pathlib import Path

import torch

from dpo import adapters, files, models
from dpo.distributed import World


def merge_adapter(name: str, output_dir: Path, *, dtype: str = "float32", **kwargs) -> None:
    """Writes the base model of an adapter (a Hub name or directory) with W + ΔW in place of W, and its tokenizer, to
    output_dir, which is written whole or not at all.

    An adapter that was trained on a quantised base (QLoRA) belongs to the rounded weights: with a quantization_config
    among kwargs, of from_pretrained, the base is quantised, dequantised, and only then merged.
    Raises: ValueError in one line if name holds no adapter, or something cannot be read or written.
    """
    if (base := adapters.adapter_base(name)) is None:
        raise ValueError(f"{name} holds no adapter to merge: name the output_dir of a run with use_peft")
    model = models.load_model(base, dtype=dtype, **kwargs)
    if getattr(model, "is_quantized", False):
        model = model.dequantize()
    model, _ = adapters.add_saved_adapter(model, name, "main", "default")
    merged = model.merge_and_unload(safe_merge=True)
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    with files.written_aside(output_dir, alone) as unfinished:
        merged.save_pretrained(unfinished)
        models.load_processor(name).save_pretrained(unfinished)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dpo.merge", description=__doc__, allow_abbrev=False)
    parser.add_argument("adapter", help="Hub name or directory of an adapter, such as a run's output_dir")
    parser.add_argument("output_dir", help="where the merged model goes")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of its weights")
    parser.add_argument("--load_in_4bit", action="store_true", help="the adapter was trained on 4 bits (QLoRA)")
    parser.add_argument("--load_in_8bit", action="store_true", help="the same with 8 bits")
    parser.add_argument("--bnb_4bit_quant_type", default="nf4", choices=["nf4", "fp4"], help="as in the training")
    parser.add_argument("--use_bnb_nested_quant", action="store_true", help="as in the training")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    args = parser.parse_args(argv)
    output_dir = Path(args.output_dir)
    try:
        if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
            raise ValueError(f"{output_dir} is there already: name another directory")
        bits = {"load_in_4bit": args.load_in_4bit, "load_in_8bit": args.load_in_8bit, "dtype": args.dtype}
        bits = models.quantization(**bits, quant_type=args.bnb_4bit_quant_type, nested=args.use_bnb_nested_quant)
        merge_adapter(args.adapter, output_dir, dtype=args.dtype, trust_remote_code=args.trust_remote_code, **bits)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Saved in {output_dir}: a model without an adapter")


if __name__ == "__main__":
    main()
