"One of two processes that distil together; process 0 reports how far their teachers lie apart"

import copy
import sys
from pathlib import Path

import tiny_run
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dlm.diffusion.consistency import ConsistencyDistillation, Doubling
from dlm.diffusion.corruption import Uniform
from dlm.training.teacher import Teacher


def distillation(**changes):
    "Teachers renewed every five steps, strides of 1/8, 1/4, 1/2"
    growth = {"growth": Doubling(8), "refresh_every": 5}
    return ConsistencyDistillation(Uniform(tiny_run.VOCAB), **growth | changes)


def network(**changes):
    "A network whose answers are no longer all alike, as if it had been trained"
    net, g = tiny_run.network(**{"time_conditioning": True} | changes), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return net


def sharded_student():
    "Whether a teacher takes over whole weights from a student that was sharded and has moved"
    student = network()
    teacher, moved = Teacher(student, 5, "cpu"), copy.deepcopy(student)
    fully_shard(student, mesh=init_device_mesh("cpu", (2,)))
    with torch.no_grad():
        for p in (*student.parameters(), *moved.parameters()):
            p.add_(1.0)
    teacher.refresh(student, 3)
    early = torch.equal(teacher.network.head.bias, moved.head.bias)
    teacher.refresh(student, 5)
    found, expected = teacher.network.state_dict(), moved.state_dict()
    return not early and all(type(found[n]) is torch.Tensor and torch.equal(found[n], expected[n]) for n in expected)


if __name__ == "__main__":
    trainer = tiny_run.trainer(Path(sys.argv[1]), network(), distillation(), False, micro_batch_size=2)
    trainer.train_or_resume()
    weights = {n: t.double().sum().item() for n, t in trainer.module.teacher.network.state_dict().items()}
    found, sharded = [None, None], sharded_student()
    dist.all_gather_object(found, weights)
    if trainer.is_world_process_zero():
        kind = type(trainer.model_wrapped).__name__
        same = found[0] == found[1]
        tiny_run.report(world=trainer.args.world_size, wrapper=kind, teacher=found[0], same=same, sharded=sharded)
