-- Trains with several strategies or settings on the same rows, and prints a table of what each learned, forgot and cost.
-- Run: homeroom run configs/compare.toml
--
-- A variant is a strategy with what is set in it: "lora r=4 learning_rate=1e-3, qlora". All of them have the same seed and see the same
-- rows in the same order.

local function variants(text)
  local list = {}
  for variant in text:gmatch("[^,]+") do
    local name, settings = nil, {}
    for word in variant:gmatch("%S+") do
      local key, value = word:match("^([%w_]+)=(.+)$")
      if key then
        settings[key] = if value == "true" then true elseif value == "false" then false else tonumber(value) or value
      elseif name then
        error(("variants: `%s` is no setting; write name=value, and a comma between two variants"):format(word))
      else
        name = word
      end
    end
    if not name then error(("variants: `%s` names no strategy"):format(variant)) end
    table.insert(list, { label = variant:match("^%s*(.-)%s*$"), strategy = name, settings = settings })
  end
  return list
end

local lessons = homeroom.prepare_dataset { path = params.lessons }.train
local exam = nil
if params.exam then
  exam = homeroom.prepare_dataset { path = params.exam }.train
else
  lessons, exam = lessons:split { eval = params.eval, seed = params.seed }
end

local results = {}
for _, variant in ipairs(variants(params.variants)) do
  local call = {
    model = homeroom.load_model { name = params.model, strategy = variant.strategy },
    dataset = lessons,
    eval = exam,
    learning_rate = params.learning_rate,
    num_train_epochs = params.epochs,
    max_steps = params.max_steps,
    per_device_train_batch_size = params.batch_size,
    seed = params.seed,
  }
  for key, value in pairs(variant.settings) do call[key] = value end
  local tuned = homeroom.fine_tune(call)
  local metrics = tuned.metrics
  local forgotten = homeroom.forgetting { model = tuned }
  table.insert(results, {
    variant = variant.label,
    adapter = tuned.adapter,
    eval_loss_before = metrics.eval_loss_before,
    eval_loss = metrics.eval_loss,
    kl = forgotten.kl,
    seconds = metrics.seconds,
    peak_memory_bytes = metrics.peak_memory_bytes,
  })
end

-- The best first.
table.sort(results, function(a, b) return a.eval_loss < b.eval_loss end)
local width = 8
for _, result in ipairs(results) do width = math.max(width, #result.variant) end
local heading = ("%%-%ds  %%8s  %%8s  %%8s  %%8s  %%8s"):format(width)
print()
print(heading:format("variant", "before", "after", "KL", "seconds", "MiB"))
for _, result in ipairs(results) do
  local memory = result.peak_memory_bytes and ("%.0f"):format(result.peak_memory_bytes / 2 ^ 20) or "?"
  print(heading:format(
    result.variant,
    ("%.4f"):format(result.eval_loss_before),
    ("%.4f"):format(result.eval_loss),
    ("%.4f"):format(result.kl),
    ("%.1f"):format(result.seconds),
    memory
  ))
end
return results
