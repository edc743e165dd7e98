"""An example of a `command` translator: every frame of a folder through a diffusers image-to-image pipeline.

    pip install '.[diffusers]'    (in the checkout of nightseg)
    python docs/night_by_diffusers.py INPUT OUTPUT --model MODEL [--seed 0] [--strength 0.35] [--prompt TEXT]

MODEL is a folder with a pipeline, or a name that diffusers can fetch. In a recipe:

    translators:
      diffusion:
        kind: command
        argv: [python, docs/night_by_diffusers.py, "{input}", "{output}", --model, /models/img2img, --seed, "{seed}"]

The lower the strength, the more of the street stays where its label says; look at edges and agreement in the report.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

NIGHT = "a photo of the same street at night, dark sky, street lamps, headlights, sensor noise"
MULTIPLE = 8  # the latent is this much smaller than the image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strength", type=float, default=0.35)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--prompt", default=NIGHT)
    asked = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.float16 if device == "cuda" else torch.float32
    pipeline = AutoPipelineForImage2Image.from_pretrained(asked.model, torch_dtype=kind).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for file in sorted(asked.input.iterdir()):
        frame = Image.open(file).convert("RGB")
        width, height = (max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in frame.size)
        # By name, not by place: a frame comes out the same whatever other frames share its folder.
        draw = hashlib.sha256(f"{asked.seed} {file.name}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(draw[:7], "big"))
        made = pipeline(
            prompt=asked.prompt,
            image=frame.resize((width, height), Image.Resampling.LANCZOS),
            strength=asked.strength,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance,
            generator=generator,
        ).images[0]
        made.resize(frame.size, Image.Resampling.LANCZOS).save(asked.output / file.name)


if __name__ == "__main__":
    main()
