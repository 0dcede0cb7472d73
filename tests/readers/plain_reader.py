"""A captioner written against the layout alone: numpy, Pillow, tokenizers, jinja2, onnxruntime.

It knows the names in ``onnx/`` and what the published files say, nothing of this package. Caches
are separate arrays that grow with each token.

    python plain_reader.py REQUEST.json ANSWERS.json
"""

import json
import math
import sys
from pathlib import Path

import jinja2
import numpy as np
import onnxruntime as ort
from PIL import Image
from tokenizers import Tokenizer


class Reader:
    def __init__(self, folder):
        read = lambda name: json.loads((folder / name).read_text("utf-8"))  # noqa: E731
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
        self.vision, self.embed, self.decoder = (
            ort.InferenceSession(folder / "onnx" / f"{n}.onnx", options) for n in names
        )
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.image_token = read("config.json")["image_token_id"]
        self.rows = read("processor_config.json")["image_seq_len"]
        self.settings = read("preprocessor_config.json")
        plain = folder / "chat_template.jinja"
        source = plain.read_text("utf-8") if plain.exists() else ""
        for name in ("chat_template.json", "tokenizer_config.json"):
            source = source or ((folder / name).exists() and read(name).get("chat_template")) or ""
        self.template = jinja2.Template(source, trim_blocks=True, lstrip_blocks=True)
        stops = read("generation_config.json")["eos_token_id"]
        self.stops = stops if isinstance(stops, list) else [stops]

    def tiles(self, image):
        longest = self.settings["size"]["longest_edge"]
        side = self.settings["max_image_size"]["longest_edge"]
        scale = lambda n: math.ceil(n / side) * side  # noqa: E731
        ratio = image.width / image.height
        if ratio >= 1:
            size = longest, -(-int(longest / ratio) // 2) * 2
            whole = scale(size[0]), scale(int(scale(size[0]) / (size[0] / size[1])))
        else:
            size = -(-int(longest * ratio) // 2) * 2, longest
            whole = scale(int(scale(size[1]) * (size[0] / size[1]))), scale(size[1])
        lanczos = Image.Resampling.LANCZOS
        image = image.convert("RGB").resize(size, lanczos).resize(whole, lanczos)
        columns, rows = whole[0] // side, whole[1] // side
        cut = [
            image.crop((c * side, r * side, (c + 1) * side, (r + 1) * side))
            for r in range(rows)
            for c in range(columns)
        ]
        cut.append(image.resize((side, side), lanczos))
        values = np.stack([np.asarray(t, np.float32) for t in cut]) / 255 * 2 - 1
        return values.transpose(0, 3, 1, 2), rows, columns

    def ids(self, prompt, rows, columns):
        image = "<image>" * self.rows
        mark = "<fake_token_around_image>"
        lines = [
            "".join(f"{mark}<row_{r}_col_{c}>{image}" for c in range(1, columns + 1)) + "\n"
            for r in range(1, rows + 1)
        ]
        expanded = "".join(lines) + f"\n{mark}<global-img>{image}{mark}"
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.template.render(
            messages=[{"role": "user", "content": content}], add_generation_prompt=True
        )
        return np.array(self.tokenizer.encode(text.replace("<image>", expanded)).ids)

    def caption(self, image, prompt, limit):
        pixels, rows, columns = self.tiles(image)
        ids = self.ids(prompt, rows, columns)
        features = self.vision.run(["image_features"], {"pixel_values": pixels[None]})[0]
        embeds = self.embed.run(["inputs_embeds"], {"input_ids": ids[None]})[0]
        embeds[0, ids == self.image_token] = features.reshape(-1, features.shape[-1])
        past = {
            i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for i in self.decoder.get_inputs()
            if i.name.startswith("past_key_values")
        }
        outputs = ["logits", *(n.replace("past_key_values", "present") for n in past)]
        length, tokens = len(ids), []
        while len(tokens) < limit:
            feed = {"inputs_embeds": embeds, "num_logits_to_keep": np.array(1), **past}
            feed["attention_mask"] = np.ones((1, length), np.int64)
            logits, *present = self.decoder.run(outputs, feed)
            past = dict(zip(past, present, strict=True))
            token = int(logits[0, -1].argmax())
            if token in self.stops:
                break
            tokens.append(token)
            length += 1
            embeds = self.embed.run(["inputs_embeds"], {"input_ids": np.array([[token]])})[0]
        return {"tokens": tokens, "input_ids": ids.tolist(), "text": self.tokenizer.decode(tokens)}


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    reader = Reader(Path(request["model"]))
    answers = [
        reader.caption(Image.open(c["image"]), request["prompt"], request["max_new_tokens"])
        for c in request["cases"]
    ]
    Path(sys.argv[2]).write_text(json.dumps(answers), "utf-8")
