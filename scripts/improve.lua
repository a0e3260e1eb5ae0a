-- Trains on answers that people rated, and puts the new model in the place of the old one only if it is better on held-out rows and has
-- not forgotten what its base can do. Else the old one stays, and the result says why.
-- Run: homeroom run configs/improve.toml
--
-- A row of the ratings is an answer and what somebody thought of it: `prompt`, `completion` and `label`, which is true or false, as TRL's
-- KTO has it, or "up" or "down", as thumbs are. `homeroom feedback export` writes such rows. With `--pairs` it writes what dpo learns from:
-- `prompt`, `chosen` and `rejected`, an answer that was corrected and its correction.

local RATINGS = { ["true"] = true, up = true, ["👍"] = true, ["false"] = false, down = false, ["👎"] = false }

local of_pairs = params.objective == "dpo"

local function is_liked(row)
  if of_pairs then return true end
  local liked = RATINGS[tostring(row.label):lower()]
  if liked == nil then
    error(("`label` is %s; it should be true or false, \"up\" or \"down\" (prompt: %s)"):format(tostring(row.label), tostring(row.prompt)))
  end
  return liked
end

-- What a row teaches, without what was thought of it.
local function answer(row)
  return { prompt = row.prompt, completion = of_pairs and row.chosen or row.completion }
end

local ratings = homeroom.prepare_dataset { path = params.ratings }.train:dedupe()

-- What the new model has to be better on. Rows of people who know are best; else some of the liked answers are kept back.
local liked = ratings:filter(is_liked)
local lessons, exam = ratings, nil
if params.exam then
  exam = homeroom.prepare_dataset { path = params.exam }.train
else
  -- Of the liked ones alone, so that there is one, however few of all they are.
  liked, exam = liked:split { eval = params.eval, seed = params.seed }
  exam = exam:map(answer)
  lessons = of_pairs and liked or liked:concat(ratings:filter(function(row) return not is_liked(row) end))
end

-- sft learns what was liked; kto also learns what not to say, and dpo what to say instead.
if params.objective == "sft" then lessons = liked:map(answer) end

-- The model that answers now; in the first round there is none of that name, and the base is what is to be improved.
local base = homeroom.load_model { name = params.model, strategy = params.strategy, r = params.r }
local there, present = pcall(homeroom.load_fine_tuned_model, { name = params.name })
if not there then
  if not present:find("there is no model", 1, true) then error(present) end
  present = nil
end

local before = homeroom.evaluate { model = present or base, dataset = exam }
local tuned = homeroom.fine_tune {
  model = params.start == "present" and present or base,
  dataset = lessons,
  objective = params.objective,
  learning_rate = params.learning_rate,
  num_train_epochs = params.epochs,
  max_steps = params.max_steps,
  per_device_train_batch_size = params.batch_size,
  seed = params.seed,
}
local after = homeroom.evaluate { model = tuned, dataset = exam }
local forgotten = homeroom.forgetting { model = tuned }

local reasons = {}
if not (after.loss < before.loss - params.min_gain) then
  table.insert(reasons, ("the held-out loss is %.4f, and that of the present model %.4f"):format(after.loss, before.loss))
end
if not (forgotten.kl <= params.max_kl) then
  table.insert(reasons, ("it forgets: the KL divergence from the base is %.4f nats a token, and max_kl %.4f"):format(forgotten.kl, params.max_kl))
end
local promoted = #reasons == 0
if promoted then
  local saved = homeroom.save_model { model = tuned, name = params.name }
  homeroom.create_handler { name = params.name, model = saved }
  print(("promoted  %s   held-out loss %.4f before, %.4f now"):format(params.name, before.loss, after.loss))
else
  local stays = present and ("%s stays as it is"):format(params.name) or "nothing is saved"
  homeroom.log.warn(("not promoted, %s: %s"):format(stays, table.concat(reasons, "; ")))
end
return {
  model = params.name,
  promoted = promoted,
  reasons = reasons,
  adapter = tuned.adapter,
  rated = #ratings,
  liked = #liked,
  trained = #lessons,
  eval_loss_before = before.loss,
  eval_loss = after.loss,
  kl = forgotten.kl,
}
