"""Import what the roles import, so that the image holds compiled bytecode for exactly these modules."""

import importlib

MODULES = """
    accelerate  datasets  diffusers  flwr_datasets  peft  pynvml  torch
    diffusers.loaders.lora_pipeline  diffusers.models.autoencoders.autoencoder_kl
    diffusers.models.unets.unet_2d_condition
    diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
    transformers.models.clip.modeling_clip  transformers.models.clip.tokenization_clip
    flwr.cli.app  flwr.clientapp  flwr.serverapp
    flwr.supercore.cli.flower_superexec  flwr.superlink.cli.flower_superlink  flwr.superlink.cli.flwr_serverapp
    flwr.superlink.main  flwr.supernode.cli.flower_supernode  flwr.supernode.cli.flwr_clientapp  flwr.supernode.main
"""

for name in MODULES.split():
    importlib.import_module(name)
