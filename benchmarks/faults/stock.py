"""The same sites under Flower's own FedAvg with a naive save: what the faults do where nobody thought of them.

In a real federation this is the bundle's app.stock; in one process the functions are called as they are. Our ClientApp
stays what it is: here its adapter is only taken out of, and put into, an array a tensor, as FedAvg wants it.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from app import bases, model, wire
from app.config import RunConfig
from app.site import client_app

app, client = ServerApp(), ClientApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    from safetensors.torch import save_file

    config = RunConfig.read(context.run_config)
    base = bases.locate(config.base_model, Path(os.environ["BOUQUET_MODELS"]))
    order = ConfigRecord({"base-fingerprint": model.fingerprint(base)["base"]})
    start = ArrayRecord(model.new_adapter(base, config))
    result = FedAvg().start(grid, start, num_rounds=config.rounds, train_config=order, evaluate_config=order)
    save_file(
        result.arrays.to_torch_state_dict(),
        Path(os.environ["BOUQUET_ADAPTERS"]) / f"stock-{context.run_id}.safetensors",
    )


@client.train()
@client.evaluate()
def take_part(message: Message, context: Context) -> Message:
    config = dict(message.content["config"])
    order = {"round": config["server-round"], "base-fingerprint": config["base-fingerprint"]}
    arrays = wire.pack(message.content["arrays"].to_torch_state_dict())
    # the hub gave every site the same record: not changed
    message.content = RecordDict({"arrays": arrays, "config": ConfigRecord(order)})
    reply = client_app.app(message, context)
    if reply.has_content() and "arrays" in reply.content:
        reply.content["arrays"] = ArrayRecord(wire.unpack(reply.content["arrays"]))
    return reply
