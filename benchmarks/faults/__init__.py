"""Faults on purpose: a real deployment of three sites, one fault in the middle of a round, and the checker's verdict
afterwards.

bench.py      the deployment; whatever ends is started again at once, as Docker's restart policy does
case.py       a case, one repeat of it, and the verdict
kills.py, network.py, disk.py, containers.py, photos.py, updates.py      the cases
hostile/      on a site's PYTHONPATH: what its ClientApp does wrong (lies.py)
stock.py      the same lies to Flower's own FedAvg
outcome.py    what a repeat left, and the table
"""
