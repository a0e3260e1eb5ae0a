-- Trains on easy rows first and on hard ones last. Each stage goes on from the adapter of the one before, and counts only if the
-- loss on the same held-out rows falls.
-- Run: homeroom run configs/curriculum.toml --set model=MODEL --set dataset=rows.jsonl
--
-- Bengio et al. 2009, "Curriculum learning", <https://doi.org/10.1145/1553374.1553380>. Later stages also train on rows of earlier
-- ones, since a model forgets what it no longer sees.

-- How hard a row is: its length, and 100 for each message. Change this to what is hard in your rows; any number will do.
local function difficulty(row)
  local chars = 0
  for _, message in ipairs(row.messages or { { content = row.text or row.prompt .. row.completion } }) do
    chars += #(message.content or "")
  end
  return 100 * #(row.messages or {}) + chars
end

-- The held-out rows are drawn once, so that the losses of different stages can be compared. Equal rows are removed before:
-- one of them could be trained on, and the other held out.
local all = homeroom.prepare_dataset { path = params.dataset }.train:dedupe()
local pool, held_out = all:split { eval = params.eval, seed = params.seed }
local easy, medium, hard = table.unpack(pool:bucket { by = difficulty, quantiles = { 0.33, 0.66 } })

local stages = {
  { name = "easy", rows = easy, learning_rate = params.learning_rate },
  { name = "medium", rows = medium:concat(easy:sample { n = medium:len() // 3 + 1 }), learning_rate = params.learning_rate / 2 },
  { name = "hard", rows = hard:concat(pool:sample { n = hard:len() // 2 + 1 }), learning_rate = params.learning_rate / 4 },
}

local best = homeroom.load_model { name = params.model, strategy = "lora", r = params.r }
local best_loss, best_stage = math.huge, "none"
for _, stage in ipairs(stages) do
  local tuned = homeroom.fine_tune {
    model = best, -- goes on from the adapter of the best stage so far
    dataset = stage.rows,
    eval = held_out,
    max_steps = params.max_steps,
    learning_rate = stage.learning_rate,
    eval_steps = params.eval_steps,
    on_eval = function(report)
      -- The learning rate falls, so a stage that is so far off does not come back.
      if report.eval_loss > 1.5 * report.best then
        return { stop = "the held-out loss rises" }
      end
    end,
  }
  local loss = tuned.metrics.eval_loss
  print(("%-7s %4d rows   held-out loss %.4f   %s"):format(stage.name, stage.rows:len(), loss, tuned.stopped))
  if loss >= best_loss then
    homeroom.log.warn("no gain: the stage before it is saved", { stage = stage.name, loss = loss, best = best_loss })
    break
  end
  best, best_loss, best_stage = tuned, loss, stage.name
end

local saved = homeroom.save_model { model = best, name = params.name }
homeroom.create_handler { name = params.name, model = saved }
return { model = saved.name, stage = best_stage, eval_loss = best_loss }
