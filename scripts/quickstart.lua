-- Teaches the pocket model a rule that it lacks, and asks it before and after: questions with words it was never shown.
-- Run: homeroom run configs/quickstart.toml
local base = homeroom.load_model { name = params.model, strategy = "lora" }
local lessons = homeroom.prepare_dataset { path = params.lessons }.train
local exam = homeroom.prepare_dataset { path = params.exam }.train

local prompts, answers = {}, {}
for i, row in ipairs(exam:rows()) do
  if i > params.questions then break end
  table.insert(prompts, row.messages[1].content)
  table.insert(answers, row.messages[2].content)
end

local function sit_exam(model)
  local replies = homeroom.generate { model = model, prompts = prompts, max_tokens = 24, temperature = 0 }
  local right = 0
  for i, reply in ipairs(replies) do
    if reply == answers[i] then right = right + 1 end
  end
  return replies, right
end

local before, right_before = sit_exam(base)
local tuned = homeroom.fine_tune {
  model = base,
  dataset = lessons,
  eval = exam,
  r = params.r,
  learning_rate = params.learning_rate,
  epochs = params.epochs,
  batch_size = params.batch_size,
}
local after, right_after = sit_exam(tuned)
local saved = homeroom.save_model { model = tuned, name = params.name }
homeroom.create_handler { name = params.name, model = saved }

local log = homeroom.log.info
log(("held-out loss   %.3f before, %.3f after"):format(tuned.metrics.eval_loss_before, tuned.metrics.eval_loss))
log(("right answers   %d of %d before, %d after"):format(right_before, #prompts, right_after))
for i = 1, math.min(3, #prompts) do
  log(("  %s   before: %s   after: %s"):format(prompts[i], before[i], after[i]))
end
log(("next   homeroom chat --model-dir %s --prompt %q"):format(params.name, prompts[1]))

local questions = {}
for i, prompt in ipairs(prompts) do
  questions[i] = { prompt = prompt, expected = answers[i], before = before[i], after = after[i] }
end
return {
  name = params.name,
  right_before = right_before,
  right_after = right_after,
  eval_loss_before = tuned.metrics.eval_loss_before,
  eval_loss = tuned.metrics.eval_loss,
  questions = questions,
}
