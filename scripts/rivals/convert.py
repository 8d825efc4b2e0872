"""The checkpoint in the forms that rivals read: a GGUF file dequantised to f32, twice.

    python convert.py MODEL.gguf DIR

DIR/hf is a Hugging Face directory (safetensors, tokenizer, chat template), DIR/f32.gguf a GGUF file.
Both appear whole or not at all.
"""

import os
import pathlib
import shutil
import sys


def to_gguf(source, target):
    import gguf
    import numpy

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, weights.astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def to_hugging_face(source, target):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = os.path.split(os.path.abspath(source))
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    # A model of its own: the loaded one remembers that it was quantised.
    model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)


def main():
    source, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for name, convert in [("f32.gguf", to_gguf), ("hf", to_hugging_face)]:
        target, part = folder / name, folder / f"{name}.part"
        if target.exists():
            continue
        if part.is_dir():
            shutil.rmtree(part)
        convert(source, part)
        part.rename(target)


main()
