-- Fine-tunes a model on a file of rows, measures it on held-out rows, saves the adapter and lets it answer.
-- Run: homeroom run configs/fine_tune.toml --set model=MODEL --set dataset=rows.jsonl
local model = homeroom.load_model { name = params.model, strategy = params.strategy }
local data = homeroom.prepare_dataset {
  path = params.dataset,
  columns = params.columns,
  system = params.system,
  on_bad_row = params.on_bad_row,
  eval = params.eval,
}

local tuned = homeroom.fine_tune {
  model = model,
  dataset = data.train,
  eval = data.eval,
  num_train_epochs = params.epochs,
  max_steps = params.max_steps,
  learning_rate = params.learning_rate,
}
local metrics = tuned.metrics

local saved = homeroom.save_model { model = tuned, name = params.name }
local handler = homeroom.create_handler { name = params.name, model = saved }
return {
  model = saved.name,
  handler = handler.name,
  eval_loss_before = metrics.eval_loss_before,
  eval_loss = metrics.eval_loss,
}
