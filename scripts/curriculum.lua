-- Train from easy rows to hard ones, in stages that carry the adapter over, each gated on the same held-out rows.
-- Run: homeroom run configs/curriculum.toml --set model=MODEL --set dataset=rows.jsonl
--
-- Bengio et al. 2009, "Curriculum learning", <https://doi.org/10.1145/1553374.1553380>. Later stages mix in rows of earlier
-- ones, since a model forgets what it no longer sees.

-- How hard a row is: many turns count more than long ones. Any number will do.
local function difficulty(row)
  local chars = 0
  for _, message in ipairs(row.messages or { { content = row.text or row.prompt .. row.completion } }) do
    chars += #(message.content or "")
  end
  return 100 * #(row.messages or {}) + chars
end

-- The gate's rows are drawn once and never trained on, so that losses of different stages can be compared. Rows that are
-- alike go first: one on each side would be both.
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
    steps = params.steps,
    learning_rate = stage.learning_rate,
    eval_every = params.eval_every,
    on_eval = function(report)
      -- A stage that has lost half of what was gained will not win it back at a falling learning rate.
      if report.eval_loss > 1.5 * report.best then
        return { stop = "the held-out loss rises" }
      end
    end,
  }
  local loss = tuned.metrics.eval_loss
  print(("%-7s %4d rows   held-out loss %.4f   %s"):format(stage.name, stage.rows:len(), loss, tuned.stopped))
  if loss >= best_loss then
    homeroom.log.warn("no gain: the stage before is kept", { stage = stage.name, loss = loss, best = best_loss })
    break
  end
  best, best_loss, best_stage = tuned, loss, stage.name
end

local saved = homeroom.save_model { model = best, name = params.name }
homeroom.create_handler { name = params.name, model = saved }
return { model = saved.name, stage = best_stage, eval_loss = best_loss }
