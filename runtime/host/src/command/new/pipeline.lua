-- Fine-tunes a model on the rows of rows.jsonl, asks it before and after, and saves what it has learned.
-- Check: homeroom run NAME/NAME.toml --check
-- Run:   homeroom run NAME/NAME.toml
local model = homeroom.load_model { name = params.model, strategy = "lora", r = params.r }
local data = homeroom.prepare_dataset { path = params.rows, eval = params.eval }

-- The same question before and after; put one of yours here.
local prompts = { "What is the chemical symbol of iron?" }
local before = homeroom.generate { model = model, prompts = prompts, max_tokens = 16 }

local tuned = homeroom.fine_tune {
  model = model,
  dataset = data.train,
  eval = data.eval,
  num_train_epochs = params.epochs,
  per_device_train_batch_size = 4,
  learning_rate = params.learning_rate,
  -- A run that is ended early goes on from the last of these: `homeroom resume`.
  save_steps = 20,
  on_step = function(report)
    -- A training that has learned its rows by heart learns nothing more from them.
    if report.loss < 0.01 then
      return { stop = "the rows are known by heart" }
    end
  end,
}

local after = homeroom.generate { model = tuned, prompts = prompts, max_tokens = 16 }
for i, prompt in ipairs(prompts) do
  print(("%s\n  before  %s\n  after   %s"):format(prompt, before[i], after[i]))
end

local saved = homeroom.save_model { model = tuned, name = params.name }
return { model = saved.name, eval_loss_before = tuned.metrics.eval_loss_before, eval_loss = tuned.metrics.eval_loss }
