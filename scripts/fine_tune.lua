-- Fine-tune on a JSONL file, say what it gained on held-out rows, save the adapter, answer with it.
-- Run: homeroom run configs/fine_tune.toml --set model=MODEL --set dataset=rows.jsonl
local model = homeroom.load_model { name = params.model, strategy = params.strategy }
local data = homeroom.prepare_dataset { path = params.dataset, eval = params.eval }

local tuned = homeroom.fine_tune {
  model = model,
  dataset = data.train,
  eval = data.eval,
  epochs = params.epochs,
  steps = params.steps,
  learning_rate = params.learning_rate,
}
local metrics = tuned.metrics
print(("held-out loss %.4f before, %.4f after"):format(metrics.eval_loss_before, metrics.eval_loss))

local saved = homeroom.save_model { model = tuned, name = params.name }
local handler = homeroom.create_handler { name = params.name, model = saved }
return { model = saved.name, handler = handler.name, eval_loss = metrics.eval_loss }
