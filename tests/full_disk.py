"A training whose files may suddenly not grow any more: what a full disk looks like from inside"

import resource
import sys
from pathlib import Path

import tiny_run
import transformers

from dlm.training.checkpoints import latest_checkpoint


class Fill(transformers.TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


folder = Path(sys.argv[1])
trainer = tiny_run.trainer(folder)
trainer.add_callback(Fill())
try:
    trainer.train()
    error = ""
except OSError as e:
    error = str(e)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
tiny_run.report(error=error, latest=latest_checkpoint(folder).name)
