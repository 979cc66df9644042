// The pod sandbox's only process; cluster/build.py builds it like every other part.
module finetune-operator/cluster/pause

go 1.26.0

tool finetune-operator/cluster/pause
