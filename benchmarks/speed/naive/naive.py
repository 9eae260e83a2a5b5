"""A federated LoRA fine-tuning as quickstarts write it, made correct: the plain contender of scripts/bench.

Each train message loads the whole pipeline, reads and encodes its images in every step, and trains; a second message
loads it again and evaluates. Flower's own FedAvg and send_and_receive. Unlike the quickstart's, its global adapter is
applied.
"""

import json
import os
import resource
import time
from pathlib import Path

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


class Watch:
    """Seconds by phase, the first being this process's start."""

    def __init__(self) -> None:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        self.seconds = {"start": time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")}
        self.last = time.monotonic()

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def numbers(self) -> dict[str, float]:
        return {f"seconds-{phase}": value for phase, value in self.seconds.items()} | {
            "peak-mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        }


def pipeline(folder: str, config: dict):
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    pipe = StableDiffusionPipeline.from_pretrained(Path(folder) / config["base"], safety_checker=None)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    rank = config["rank"]
    pipe.unet.add_adapter(
        LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]
        )
    )
    return pipe


def photos(folder: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metadata.jsonl").read_text().splitlines()]


def encode(pipe, folder: str, rows: list[dict], size: int):
    import numpy as np
    import torch
    from PIL import Image

    images = [
        np.asarray(Image.open(Path(folder) / row["file_name"]).convert("RGB").resize((size, size))) / 127.5 - 1
        for row in rows
    ]
    pixels = torch.tensor(np.stack(images), dtype=torch.float32).permute(0, 3, 1, 2)
    tokens = pipe.tokenizer(
        [row["text"] for row in rows],
        padding="max_length",
        truncation=True,
        max_length=pipe.tokenizer.model_max_length,
        return_tensors="pt",
    )
    with torch.no_grad():
        return (
            pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor,
            pipe.text_encoder(tokens.input_ids)[0],
        )


def loss_of(pipe, latents, text, t):
    import torch

    noise = torch.randn_like(latents)
    return torch.nn.functional.mse_loss(pipe.unet(pipe.scheduler.add_noise(latents, noise, t), t, text).sample, noise)


def opened(message: Message, context) -> tuple:
    watch, config, own = Watch(), dict(context.run_config), context.node_config
    import torch
    from diffusers import DDPMScheduler, StableDiffusionPipeline  # noqa: F401  so that pipeline() does not import it
    from peft import set_peft_model_state_dict

    watch.lap("imports")
    torch.manual_seed(context.run_id % 2**31)
    pipe = pipeline(str(own["models-path"]), config)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    set_peft_model_state_dict(pipe.unet, message.content["arrays"].to_torch_state_dict())
    watch.lap("load")
    return watch, config, str(own["data-path"]), pipe


@client.train()
def train(message: Message, context) -> Message:
    watch, config, folder, pipe = opened(message, context)
    import torch
    from peft import get_peft_model_state_dict

    rows = photos(folder)[: -config["held-out"]]
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimiser, total = torch.optim.AdamW(trained, lr=1e-4), 0.0
    order = torch.randperm(len(rows)).repeat(1 + config["steps"] * config["batch"] // len(rows))
    for step in range(config["steps"]):
        batch = [rows[i] for i in order[step * config["batch"] : (step + 1) * config["batch"]]]
        latents, text = encode(pipe, folder, batch, config["resolution"])
        watch.lap("encode")
        loss = loss_of(pipe, latents, text, torch.randint(1000, (len(batch),)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        total += loss.item()
        watch.lap("train")
    arrays = ArrayRecord({k: v.contiguous() for k, v in get_peft_model_state_dict(pipe.unet).items()})
    metrics = {"num-examples": len(rows), "loss": total / config["steps"]} | watch.numbers()
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context) -> Message:
    watch, config, folder, pipe = opened(message, context)
    import torch

    rows, total = photos(folder)[-config["held-out"] :], 0.0
    for start in range(0, len(rows), config["batch"]):
        batch = rows[start : start + config["batch"]]
        latents, text = encode(pipe, folder, batch, config["resolution"])
        watch.lap("encode")
        with torch.no_grad():
            for part in range(4):
                total += (
                    loss_of(pipe, latents, text, torch.randint(part * 250, part * 250 + 250, (len(batch),))).item()
                    * len(batch)
                    / 4
                )
        watch.lap("evaluate")
    metrics = {"num-examples": len(rows), "eval-loss": total / len(rows)} | watch.numbers()
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


class Timed(FedAvg):
    """FedAvg that notes when each round began, what the sites measured, the hub's seconds of sending and fetching."""

    def __init__(self, file: Path, sites: int) -> None:
        super().__init__(min_train_nodes=sites, min_evaluate_nodes=sites, min_available_nodes=sites)
        self.file, self.rounds = file, []

    def configure_train(self, *args, **kwargs):
        self.rounds.append({"began": time.time(), "messages": [], "transfer": 0.0})
        return super().configure_train(*args, **kwargs)

    def aggregate_train(self, number, replies):
        return super().aggregate_train(number, self.note(replies))

    def aggregate_evaluate(self, number, replies):
        result = super().aggregate_evaluate(number, self.note(replies))
        self.rounds[-1]["seconds"] = time.time() - self.rounds[-1]["began"]
        self.file.write_text(json.dumps(self.rounds))
        return result

    def time_transfer(self, grid) -> None:
        """Flower's send_and_receive calls these two; a look that brought nothing is no transfer."""
        push, pull = grid.push_messages, grid.pull_messages

        def timed(call, *args):
            start = time.time()
            answer = list(call(*args))
            if answer and self.rounds:
                self.rounds[-1]["transfer"] += time.time() - start
            return answer

        grid.push_messages, grid.pull_messages = lambda messages: timed(push, messages), lambda ids: timed(pull, ids)

    def note(self, replies) -> list:
        replies = list(replies)
        self.rounds[-1]["messages"] += [
            {"node": r.metadata.src_node_id, **r.content["metrics"]} for r in replies if r.has_content()
        ]
        return replies


@server.main()
def main(grid, context) -> None:
    from peft import get_peft_model_state_dict

    config, folder = dict(context.run_config), Path(os.environ["BOUQUET_ADAPTERS"])
    start = {
        k: v.contiguous()
        for k, v in get_peft_model_state_dict(pipeline(os.environ["BOUQUET_MODELS"], config).unet).items()
    }
    strategy = Timed(folder / f"{context.run_id}.json", int(os.environ["BENCH_SITES"]))
    strategy.time_transfer(grid)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(start), num_rounds=config["rounds"], timeout=3600)
