// Captions with transformers.js from local files only: node caption.mjs REQUEST.json ANSWERS.json
// `given`: from the tensors in the request; `own`: from the image, with its own processor.
import { readFile, writeFile } from 'node:fs/promises';
import {
  AutoModelForVision2Seq,
  AutoProcessor,
  RawImage,
  Tensor,
  env,
} from '@huggingface/transformers';

env.allowRemoteModels = false;
env.useFSCache = false;

const [, , requestFile, answersFile] = process.argv;
const request = JSON.parse(await readFile(requestFile, 'utf8'));
const options = {
  local_files_only: true,
  session_options: { intraOpNumThreads: 1, interOpNumThreads: 1 },
};
const model = await AutoModelForVision2Seq.from_pretrained(request.model, options);
const processor = await AutoProcessor.from_pretrained(request.model, options);

const stops = [model.generation_config.eos_token_id].flat();

async function given({ input_ids, pixels, shape }) {
  const bytes = await readFile(pixels);
  const values = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  const ids = BigInt64Array.from(input_ids, BigInt);
  const [batch, tiles, , height, width] = shape;
  return {
    input_ids: new Tensor('int64', ids, [1, ids.length]),
    attention_mask: new Tensor('int64', new BigInt64Array(ids.length).fill(1n), [1, ids.length]),
    pixel_values: new Tensor('float32', values, shape),
    pixel_attention_mask: new Tensor(
      'bool',
      new Uint8Array(tiles * height * width).fill(1),
      [batch, tiles, height, width],
    ),
  };
}

async function own({ image }) {
  const content = [{ type: 'image' }, { type: 'text', text: request.prompt }];
  const text = processor.apply_chat_template([{ role: 'user', content }], {
    add_generation_prompt: true,
  });
  return processor(text, [await RawImage.read(image)]);
}

async function caption(inputs) {
  const length = inputs.input_ids.dims[1];
  const output = await model.generate({
    ...inputs,
    max_new_tokens: request.max_new_tokens,
    do_sample: false,
  });
  const tokens = Array.from(output.data, Number).slice(length);
  if (stops.includes(tokens.at(-1))) tokens.pop();
  return {
    input_ids: Array.from(inputs.input_ids.data, Number),
    tokens,
    text: processor.batch_decode([tokens], { skip_special_tokens: true })[0],
  };
}

const answers = [];
for (const [index, item] of request.cases.entries()) {
  const inputs = await own(item);
  const values = inputs.pixel_values;
  const file = answersFile.replace('answers.json', `${index}.own.f32`);
  await writeFile(file, new Uint8Array(values.data.buffer, values.data.byteOffset, values.data.byteLength));
  answers.push({
    model: model.constructor.name,
    processor: processor.constructor.name,
    given: await caption(await given(item)),
    own: { ...(await caption(inputs)), pixels: file, shape: values.dims },
  });
}
await writeFile(answersFile, JSON.stringify(answers));
