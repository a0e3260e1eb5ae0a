-- Teaches the pocket model Pig Latin, and asks it the same questions before and after. No lesson has the words that it is asked for.
-- Run: homeroom run configs/quickstart.toml
local base = homeroom.load_model { name = params.model, strategy = "lora" }
local lessons = homeroom.prepare_dataset { path = params.lessons }.train
local exam = homeroom.prepare_dataset { path = params.exam }.train

local prompts, expected = {}, {}
for i, row in ipairs(exam:rows()) do
  if i > params.questions then break end
  prompts[i] = row.messages[1].content
  expected[i] = row.messages[2].content
end

-- The model's answers, and how many of them are right.
local function sit_exam(model)
  local answers = homeroom.generate { model = model, prompts = prompts, max_tokens = 24, temperature = 0 }
  local right = 0
  for i, answer in ipairs(answers) do
    if answer == expected[i] then right += 1 end
  end
  return answers, right
end

local before, right_before = sit_exam(base)
local tuned = homeroom.fine_tune {
  model = base,
  dataset = lessons,
  eval = exam,
  r = params.r,
  learning_rate = params.learning_rate,
  num_train_epochs = params.epochs,
  per_device_train_batch_size = params.batch_size,
}
local after, right_after = sit_exam(tuned)
local saved = homeroom.save_model { model = tuned, name = params.name }
homeroom.create_handler { name = params.name, model = saved }

-- One line of a table, in columns that fit 80 characters.
local function line(...)
  local out = ""
  for i, width in ipairs { 32, 20, 16, 6 } do
    local text = select(i, ...):gsub("%s+", " ")
    local length = utf8.len(text) or #text
    if length > width then
      text, length = text:sub(1, (utf8.offset(text, width) or width) - 1) .. "…", width
    end
    out ..= text .. (" "):rep(width + 2 - length)
  end
  print((out:gsub(" +$", "")))
end

print()
line("question", "before", "after", "right?")
for i = 1, math.min(5, #prompts) do
  line(prompts[i], before[i], after[i], after[i] == expected[i] and "yes" or "no")
end
print(("\nnext  homeroom chat --model-dir %s --prompt %q\n"):format(saved.name, prompts[1]))

local questions = {}
for i, prompt in ipairs(prompts) do
  questions[i] = { question = prompt, expected = expected[i], before = before[i], after = after[i] }
end
return {
  model = saved.name,
  right_before = right_before,
  right_after = right_after,
  eval_loss_before = tuned.metrics.eval_loss_before,
  eval_loss = tuned.metrics.eval_loss,
  questions = questions,
}
