"""Run by test_ranks.py under torchrun and alone: a few updates of a network without BatchNorm on one data
stream."""

import sys

import torch
from torch import nn

from common import data, run
from common.fuse import SGD, descend, place

out, steps, batch = sys.argv[1], 4, 16
args = run.parse(
    run.parser("ranks.py", "doc", dataset="ranks", steps=steps, batch_size=batch),
    ["--device", "cpu", "--out", out, "--batch-size", sys.argv[2], "--log-every", "1"],
)
r = run.Run(args)
rng = torch.Generator().manual_seed(0)
images = torch.randint(256, (100, 1, 8, 8), generator=rng, dtype=torch.uint8)
batches = data.Batches(images, batch_size=args.batch_size, seed=3, rank=r.rank, world=r.world)
torch.manual_seed(r.rank)  # ranks start apart: place() must bring them together
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1))
net = place(args, net)
opt = SGD(net.parameters(), 0.1, 0.5)
r.keep(net=net, opt=opt, batches=batches)
noise = torch.rand(2)
for _ in r.loop():
    loss = (net(next(batches)) - 1).square().mean()
    descend(loss, opt)
    r.log({"loss": loss})
torch.save({"net": net.state_dict(), "noise": noise}, f"{out}/rank{r.rank}of{r.world}.pt")
