"""Captions with onnxruntime-genai: python caption.py REQUEST.json ANSWERS.json

The model folder of the request holds genai_config.json. genai has no image processor for this
family, so the prepared pixels and token ids of the request are used.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as og


def caption(model, tokenizer, case, limit):
    ids = case["input_ids"]
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + limit)
    generator = og.Generator(model, params)
    pixels = np.fromfile(case["pixels"], "<f4").reshape(case["shape"])
    generator.set_model_input("pixel_values", pixels)
    generator.append_tokens(np.array([ids], np.int32))
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return {"tokens": tokens, "text": tokenizer.decode(np.array(tokens, np.int32))}


def processor_error(model):
    try:
        model.create_multimodal_processor()
    except RuntimeError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    model = og.Model(request["model"])
    tokenizer = og.Tokenizer(model)
    answers = [
        {**caption(model, tokenizer, c, request["max_new_tokens"]), "error": processor_error(model)}
        for c in request["cases"]
    ]
    Path(sys.argv[2]).write_text(json.dumps(answers), "utf-8")
