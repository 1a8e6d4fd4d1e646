"""Every setting and its default. An experiment overrides a few of these.

`--config.a.b=value` on the command line overrides them again; a key that is
not here is refused, before any weight is loaded. Of an objective, a writer and
an evaluator, settings and their defaults are in the class that a config names.
"""

import ml_collections
from ml_collections import config_dict


def get_config():
  c = ml_collections.ConfigDict()
  c.seed = 0  # of initialisation, data order, dropout and sampling
  # A run of several stages: (name, config) pairs, each in its own directory
  # <workdir>/<name>; finished stages are skipped on restart. A later stage
  # names an earlier one as 'stage:<name>': its best/ model as a `path`, its
  # answers as `data.train`. Everything below is then that of each stage.
  c.stages = ()

  c.student = ml_collections.ConfigDict()
  # HF directory, hub id, adapter, run or .gguf file.
  c.student.path = config_dict.placeholder(str)
  # None loads the weights. A dict makes random ones: the architecture of
  # `path` with these fields of DecoderConfig replaced, such as width.
  c.student.shape = config_dict.placeholder(object)
  # None keeps all of the weights. A dict cuts a smaller student out of them:
  # layers (how many, or which), ff_width, kv_heads (see gakd_jax/models/cut).
  c.student.keep = config_dict.placeholder(object)
  c.student.dtype = 'bfloat16'  # of the exported weights; training is fp32
  # None trains all weights. A dict trains adapters of a frozen base, which is
  # kept in `dtype`: rank, alpha, dropout, targets (see gakd_jax/models/lora).
  c.student.lora = config_dict.placeholder(object)
  # Of a frozen base: None, 'int8' or 'nf4' (see gakd_jax/models/quantized).
  c.student.quantize = config_dict.placeholder(str)
  # Computed again in the backward pass, for memory: 'none', 'products' (all but
  # products with weights: on a CPU faster than 'none'), 'blocks' (a third more
  # operations).
  c.student.remat = 'blocks'

  c.teacher = ml_collections.ConfigDict()
  c.teacher.path = config_dict.placeholder(str)  # HF directory, hub id, adapter
  # Of its own prompts, where its tokenizer is another than the student's; None:
  # what it was trained with, or data.template.
  c.teacher.template = config_dict.placeholder(str)
  c.teacher.dtype = 'bfloat16'  # in memory; it is never trained
  c.teacher.quantize = config_dict.placeholder(str)  # None, int8, nf4
  # What of it is kept on disk, in data.cache, so that it reads each text once:
  # 'none', 'hidden' (states: all that there is), 'top_k' or 'sampled' (ids);
  # 'data': the log-probabilities that data.train has, and no teacher.
  c.teacher.cache = 'none'
  c.teacher.cache_size = 64  # ids a token of top_k and data, draws of sampled

  # Who computes attention: cudnn on CUDA, splash on TPUs, chunked (plain JAX)
  # for every model and platform: none of them holds all scores. xla does; auto:
  # what is best here (see gakd_jax/models/attention).
  c.attention = 'auto'

  c.data = ml_collections.ConfigDict()
  # A file (.jsonl, .json, .parquet, .gz), a directory, a hub id
  # (org/name/config@revision:split), python:<module>:<function>:<arguments>, or
  # a tuple of these.
  c.data.train = config_dict.placeholder(object)
  c.data.validation = config_dict.placeholder(object)
  # qwen3, gakd, alpaca, chat, chat:<name of several>, raw (see
  # gakd_jax/data/templates); None: what a model of gakd_jax was trained with,
  # qwen3 for any other.
  c.data.template = config_dict.placeholder(str)
  c.data.max_length = 512  # tokens, prompt and response with EOS
  c.data.max_prompt_length = 256  # longer ones: dropped, shortened in evals
  c.data.buckets = config_dict.placeholder(tuple)  # lengths; None: halvings
  c.data.packing = False  # several documents a row, attention kept apart
  c.data.on_bad_row = 'skip'  # skip: count and report; fail: stop at it
  # refuse: a response with thoughts under a template that has closed them (or
  # without, under one that has opened them) is a bad row; keep: trained on.
  c.data.thinking = 'refuse'
  # Of several parts of `train`, how often an epoch has each: (1.0, 0.25), say,
  # every fourth row of the second, and in the next epoch the following ones.
  c.data.weights = config_dict.placeholder(tuple)
  # Of a conversation, train on the last answer, or on all: each is then a row.
  c.data.turns = 'last'
  c.data.drop_last = False  # the rows of an epoch that fill no batch
  # Where token ids are kept, once a data set; None: ~/.cache/gakd_jax/data.
  c.data.cache = config_dict.placeholder(str)

  # Who writes the responses: 'dataset' trains on those of data.train;
  # 'teacher' has the teacher answer its prompts first (sequence-level KD,
  # arXiv 1606.07947) and keeps them in <workdir>/answers.jsonl; its settings
  # are those of `rollout.Teacher`: temperature, samples ... 'student' writes as
  # it is before each step (`rollout.Student`: share, begin, end, every, prefix,
  # max_new_tokens ...), 'speculative' with a teacher that corrects
  # (`rollout.Speculative`); they need packing off, and room in max_length.
  c.rollout = ml_collections.ConfigDict({'writer': 'dataset'})

  # A method and its settings: see gakd_jax/objectives.
  c.objective = ml_collections.ConfigDict({'name': 'sft'})

  c.critic = ml_collections.ConfigDict()  # of the methods that have one
  # HF directory or hub id whose blocks the critic starts from, with their
  # width; None: fresh ones, of the sizes below.
  c.critic.init_from = config_dict.placeholder(str)
  c.critic.width = 128
  c.critic.layers = 2
  c.critic.heads = 2
  c.critic.ff_width = 256

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.name = 'adamw'  # adamw, rmsprop
  c.optimizer.learning_rate = 1e-5
  c.optimizer.schedule = 'cosine'  # constant, cosine, linear
  c.optimizer.end = 1e-7  # learning rate at the last step
  c.optimizer.warmup_steps = 0
  c.optimizer.b1 = 0.9  # of rmsprop: the momentum
  c.optimizer.b2 = 0.999  # of rmsprop: the decay of the squares
  c.optimizer.eps = 1e-8
  c.optimizer.weight_decay = 0.01
  c.optimizer.no_decay = r'(scale|bias)$'  # regex of parameter paths
  c.optimizer.clip_norm = config_dict.placeholder(float)  # global norm
  c.optimizer.mu_dtype = 'float32'  # of Adam's first moment; or bfloat16

  c.critic_optimizer = c.optimizer.copy_and_resolve_references()
  c.critic_optimizer.learning_rate = 2e-4
  c.critic_optimizer.schedule = 'constant'
  c.optimizer.clip_norm = 1.0
  # Of a method's own parameters (projectors, say); None: the student's.
  c.optimizer.extra_learning_rate = config_dict.placeholder(float)

  c.train = ml_collections.ConfigDict()
  c.train.steps = config_dict.placeholder(int)  # optimizer steps, or
  c.train.epochs = config_dict.placeholder(float)  # passes over the data
  c.train.batch_size = 32  # rows an optimizer step, over all devices
  c.train.microbatch_size = config_dict.placeholder(int)  # None: all at once
  c.train.precision = 'bfloat16'  # compute dtype; master weights are fp32
  c.train.head_chunk = 512  # tokens a device whose logits exist at a time
  # GB of these logits, of both models together, instead of head_chunk.
  c.train.head_memory = config_dict.placeholder(float)
  # A step that is not finite is skipped (see gakd_jax/skips); so many in a row
  # end the run.
  c.train.max_skipped = 10
  # So is one whose loss or gradient norm is so many robust standard deviations
  # above the median of the last 64, 6.0 say; None: no spike is.
  c.train.skip_spikes = config_dict.placeholder(float)

  # name: settings, see gakd_jax/evals/*.py; `kind` if the name is your own.
  c.evals = ml_collections.ConfigDict({'loss': {}})
  c.eval_every = 500  # steps; 0: at the end only; a line's own `every` wins
  c.eval_first = False  # also at step 0: what the student was before

  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every = 500  # steps; 0: at the end and when interrupted only
  # The newest checkpoints that stay on disk; beside them the newest that was
  # the best when it was saved, and each whose step is a multiple of keep_every.
  c.checkpoint.keep = 2  # Of one that is damaged, the run goes on from another.
  c.checkpoint.keep_every = 0
  # best/ is the model with the best of this metric; None: the last one.
  c.checkpoint.best_metric = config_dict.placeholder(str)
  # So many measurements of best_metric in a row that are no better end the run.
  c.checkpoint.patience = config_dict.placeholder(int)

  c.mesh = ml_collections.ConfigDict()  # devices an axis; -1: what is left
  c.mesh.data = -1  # copies of the model
  c.mesh.fsdp = 1  # parameters and batch split
  c.mesh.tensor = 1  # heads, feed-forward and vocabulary split

  c.report = ml_collections.ConfigDict()
  # Programs that show the metrics: tensorboard, wandb, mlflow; the last two are
  # told where by environment variables (see gakd_jax/trackers).
  c.report.trackers = ('tensorboard',)
  c.report.answers = 6  # prompts in report.html without JavaScript; 0: none
  c.report.rollouts = 4  # prompts whose rollouts it shows over training
  # Averages over sets: {what its column is called: names of `evals`}.
  c.report.averages = ml_collections.ConfigDict()
  c.lock()
  # These hold what is not the default; whatever else their constructors take
  # may be set, in a config or on the command line.
  for part in (c.rollout, c.objective, c.evals, c.report.averages):
    part.unlock()
  return c


def generation(data, **settings):
  """A line of `config.evals` that scores answers, as the suites have it.

  Of a plain dict {'kind': 'generation'} the `batch_size` is 32; and it may have
  `check`, a rule of one's own: see gakd_jax/evals/generation.
  """
  c = ml_collections.ConfigDict({'kind': 'generation', 'data': data})
  c.limit = config_dict.placeholder(int)  # the first rows only
  c.task = 'instruct'  # which scores: see gakd_jax/evals/tasks.py
  c.max_new_tokens = 256  # EOS included
  # Strings before which an answer ends; None: those of the task.
  c.stop = config_dict.placeholder(tuple)
  c.temperature = 1.0  # 0 is greedy
  c.top_k = 0  # 0: off
  c.top_p = 1.0  # 1: off
  c.no_repeat_ngram = 6  # 0: off
  c.cache = config_dict.placeholder(str)  # 'int8': keys and values in int8
  c.seeds = (10, 20, 30, 40, 50)
  c.batch_size = 128  # prompts decoded together
  c.first_reference = False  # score against it alone, not the best of all
  c.update(settings)
  return c


def greedy(data, **settings):
  """`generation` without chance, and without blocked n-grams."""
  settings = {'temperature': 0.0, 'no_repeat_ngram': 0} | settings
  return generation(data, seeds=(0,), **settings)
