-- Writes question and answer rows from a text of yours, plain or Markdown, for `fine-tune`: a model or a handler asks questions about each
-- passage and answers them from it, twice. A row is kept if both answers say the same, the answer stands in the passage, and the question
-- can be asked without it. What is kept says where it is from. Read it before you train on it.
-- Run: homeroom run configs/questions.toml --set text=chapter.md --set model=MODEL

local ASK = [[Text:
%s

Write one short question that a pupil could be asked about this text. The question must make sense to someone who cannot see the text. Write the question and nothing else.]]
local ANSWER = [[Text:
%s

Question: %s
Answer the question in one short sentence, from the text alone.]]

-- Words that say nothing about what a sentence is about, in the languages that schools here write: they are not compared.
local COMMON = {}
for word in ([[
  a an and are as at be by can do does for from has have how in is it its of on or that the their they this to was were what when where
  which who why will with you
  aber als am an auch auf aus bei das dem den der des die ein eine einem einen einer er es für hat ist im in mit nicht oder sie sind und
  von war warum was welche wer wie wird wo zu zum zur
  al como con cual de del el en es la las lo los más no o para por que qué se son su sus un una y
  au aux avec ce cette dans de des du elle en est et il la le les leur ne ou par pas pour que qui quoi se son sur un une
]]):gmatch("%S+") do
  COMMON[word] = true
end

-- The words of a text that it is about, each once.
local function words(text)
  local found, count = {}, 0
  for word in text:lower():gmatch("[%w\128-\255]+") do
    if not COMMON[word] and not found[word] then
      found[word] = true
      count += 1
    end
  end
  return found, count
end

-- Share of the words of one text that another has, too.
local function covered(text, other)
  local own, count = words(text)
  local others, both = words(other), 0
  for word in pairs(own) do
    if others[word] then both += 1 end
  end
  return count == 0 and 0 or both / count
end

-- The first line that says something, without marks and numbers before it.
local function line_of(answer)
  for line in answer:gmatch("[^\n]+") do
    local text = line:gsub("^%s*[%-%*#>]*%s*", ""):gsub("^%d+[%.%)]%s+", ""):gsub("^%u%l+:%s+", "")
    text = text:gsub("^[\"*]+", ""):gsub("[\"*]+$", ""):gsub("%s+$", "")
    if #text > 0 then return text end
  end
  return ""
end

-- What is wrong with a question, if something is.
local function problem_of(question)
  if not question:find("?", 1, true) then return "is no question" end
  local _, marks = question:gsub("?", "")
  if marks > 1 then return "is several questions" end
  if #question > 300 then return "is too long" end
  local lower = " " .. question:lower()
  for _, word in { " text", " passage", " abschnitt", " texto", " texte", " author", " autor" } do
    if lower:find(word, 1, true) then return "speaks of the text" end
  end
  local _, count = words(question)
  if count < 1 then return "asks nothing" end
  return nil
end

local passages = homeroom.read_passages { path = params.text, max_words = params.passage_words }
if params.passages then passages = passages:sample { n = params.passages, seed = params.seed } end
local rows = passages:rows()
if #rows == 0 then error(("%s has no passage of 20 words or more"):format(params.text)) end

-- Who writes: a handler, here or where its route allows, or a model of this machine.
local function generate(prompts, seed, temperature)
  if #prompts == 0 then return {} end
  return homeroom.generate {
    model = not params.handler and params.model or nil,
    handler = params.handler,
    prompts = prompts,
    max_tokens = params.max_tokens,
    temperature = temperature,
    seed = seed,
  }
end

local reasons, candidates, seen = {}, {}, {}
local function leave_out(why)
  reasons[why] = (reasons[why] or 0) + 1
end

for round = 1, params.questions do
  local prompts = {}
  for i, row in rows do prompts[i] = ASK:format(row.text) end
  -- Each round draws other questions.
  for i, answer in generate(prompts, params.seed + round, 0.8) do
    local question = line_of(answer)
    -- A dry run asks nobody.
    if answer == "" then continue end
    local problem = problem_of(question)
    local key = question:lower():gsub("[^%w\128-\255]+", " ")
    if problem then
      leave_out("the question " .. problem)
    elseif seen[key] then
      leave_out("the question was asked before")
    else
      seen[key] = true
      table.insert(candidates, { question = question, row = rows[i] })
    end
  end
end

-- Both passes answer from the passage; the second is to find the same without knowing the first.
local prompts = {}
for i, candidate in candidates do prompts[i] = ANSWER:format(candidate.row.text, candidate.question) end
local first, second = generate(prompts, params.seed, 0), generate(prompts, params.seed + 1, 0.5)

local kept = {}
for i, candidate in candidates do
  local answer, again = line_of(first[i]), line_of(second[i])
  local _, count = words(answer)
  if count == 0 then
    leave_out("the answer says nothing")
  elseif covered(answer, candidate.row.text) < params.grounded then
    leave_out("the answer does not stand in the passage")
  elseif math.max(covered(answer, again), covered(again, answer)) < params.agreement then
    leave_out("two answers differ")
  elseif covered(answer, candidate.question) == 1 then
    leave_out("the answer repeats the question")
  else
    table.insert(kept, {
      messages = { { role = "user", content = candidate.question }, { role = "assistant", content = answer } },
      source = candidate.row.source,
      line = candidate.row.line,
      heading = candidate.row.heading,
      passage = candidate.row.text,
      written_by = params.handler or params.model,
    })
  end
end

for why, count in reasons do print(("left out  %4d   %s"):format(count, why)) end
if #kept == 0 then
  if not next(reasons) then return { rows = 0, passages = #rows } end
  homeroom.log.warn("no row was kept: a larger model, or another `passage_words`, writes better questions")
  return { rows = 0, passages = #rows, left_out = reasons }
end
local saved = homeroom.save_dataset { dataset = homeroom.dataset { rows = kept }, name = params.name }
print(("kept      %4d of %d   read them before you train: %s"):format(#kept, #rows * params.questions, saved.path))
return { rows = #kept, path = saved.path, passages = #rows, left_out = reasons }
