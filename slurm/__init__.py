"""`ifvit submit`: the verbs as jobs on a SLURM cluster, preempted and requeued without loss."""
