-- Writes question and answer rows from a text of yours, plain or Markdown, for `fine-tune`. By `method = "sentences"` each sentence is an answer,
-- word for word as it stands in the text. Its question follows from its form, where that is plain English, and else a model or a handler
-- writes it, and has to find the sentence by it: that works with a small model. By `"passages"` a model asks about whole passages and
-- answers twice in words of its own, and what agrees is kept; that takes one of some billions. What is kept says where it is from. Read it
-- before you train on it.
-- Run: homeroom run configs/questions.toml --set text=chapter.md --set model=MODEL

local ASK = [[Text:
%s

Write one short question that a pupil could be asked about this text. The question must make sense to someone who cannot see the text. Write the question and nothing else.]]
local ANSWER = [[Text:
%s

Question: %s
Answer the question in one short sentence, from the text alone.]]
-- Examples show a small model more than words do. They are in the language of the text, as far as that is one of these.
local LANGUAGES = {
  en = {
    words = "the of and is in to was are it by",
    ask = "Write the question that the sentence answers. The question must name the topic.",
    names = { "Topic", "Sentence", "Question" },
    examples = {
      { "Nile", "It is the longest river of Africa and flows through eleven countries.", "How many countries does the Nile flow through?" },
      { "Telephone", "Patented by Alexander Graham Bell in 1876.", "Who patented the telephone in 1876?" },
      { "Penguins", "Their black and white feathers hide them from seals.", "What hides penguins from seals?" },
      { "Glass", "It is made by heating sand, soda and lime.", "How is glass made?" },
    },
    asks = { who = "name", whose = "name", when = "number", ["how many"] = "number", ["how much"] = "number", ["what year"] = "number" },
    openers = "what who whose whom when where which why how in on from to by for at is are was were do does did can",
  },
  de = {
    words = "der die das und ist in den von mit ein",
    ask = "Schreibe die Frage, auf die der Satz antwortet. Die Frage muss das Thema nennen.",
    names = { "Thema", "Satz", "Frage" },
    examples = {
      { "Nil", "Er ist der längste Fluss Afrikas und fließt durch elf Länder.", "Durch wie viele Länder fließt der Nil?" },
      { "Telefon", "1876 wurde es von Alexander Graham Bell patentiert.", "Wer hat 1876 das Telefon patentiert?" },
      { "Pinguine", "Ihr schwarz-weißes Gefieder verbirgt sie vor Robben.", "Was verbirgt Pinguine vor Robben?" },
      { "Glas", "Man stellt es her, indem man Sand, Soda und Kalk erhitzt.", "Wie wird Glas hergestellt?" },
    },
    asks = { wer = "name", wem = "name", wann = "number", ["wie viel"] = "number", ["wie viele"] = "number" },
    openers = "was wer wem wen wessen wann wo wohin woher warum wieso weshalb wie welche welcher welches welchen welchem wodurch womit wofür woraus worin durch in aus von zu mit für seit bei ist sind war hat",
  },
  es = {
    words = "el la de que y en es los las por",
    ask = "Escribe la pregunta a la que responde la frase. La pregunta debe nombrar el tema.",
    names = { "Tema", "Frase", "Pregunta" },
    examples = {
      { "Nilo", "Es el río más largo de África y atraviesa once países.", "¿Cuántos países atraviesa el Nilo?" },
      { "Teléfono", "Fue patentado por Alexander Graham Bell en 1876.", "¿Quién patentó el teléfono en 1876?" },
      { "Pingüinos", "Sus plumas blancas y negras los esconden de las focas.", "¿Qué esconde a los pingüinos de las focas?" },
      { "Vidrio", "Se hace calentando arena, sosa y cal.", "¿Cómo se hace el vidrio?" },
    },
    asks = { ["¿quién"] = "name", ["¿cuándo"] = "number", ["¿cuántos"] = "number", ["¿cuántas"] = "number" },
    openers = "¿qué ¿quién ¿quiénes ¿cuándo ¿dónde ¿cuál ¿cuáles ¿cuántos ¿cuántas ¿cuánto ¿cómo ¿por ¿en ¿de ¿a ¿para ¿con ¿es ¿son",
  },
  fr = {
    words = "le la les de et est en des du par",
    ask = "Écris la question à laquelle répond la phrase. La question doit nommer le sujet.",
    names = { "Sujet", "Phrase", "Question" },
    examples = {
      { "Nil", "C'est le plus long fleuve d'Afrique et il traverse onze pays.", "Combien de pays le Nil traverse-t-il ?" },
      { "Téléphone", "Il fut breveté par Alexander Graham Bell en 1876.", "Qui a breveté le téléphone en 1876 ?" },
      { "Manchots", "Leurs plumes noires et blanches les cachent des phoques.", "Qu'est-ce qui cache les manchots des phoques ?" },
      { "Verre", "On le fabrique en chauffant du sable, de la soude et de la chaux.", "Comment fabrique-t-on le verre ?" },
    },
    asks = { qui = "name", quand = "number", combien = "number" },
    openers = "que qu quel quelle quels quelles qui quand où combien comment pourquoi de à en dans par pour est",
  },
}

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

-- Whether two words are one, but for an ending: `discovered` and `discover`.
local function alike(a, b)
  if a == b then return true end
  local shorter = math.min(#a, #b)
  return shorter >= 4 and math.max(#a, #b) - shorter <= 3 and a:sub(1, shorter - 1) == b:sub(1, shorter - 1)
end

-- Share of the words of one text that another has, too.
local function covered(text, other)
  local own, count = words(text)
  local others, both = words(other), 0
  for word in pairs(own) do
    local found = others[word]
    if not found then
      for another in pairs(others) do
        if alike(word, another) then
          found = true
          break
        end
      end
    end
    if found then both += 1 end
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
  for _, word in { " text", " passage", " sentence", " abschnitt", " satz ", " texto", " frase ", " texte", " phrase", " author", " autor", " topic", " question" } do
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
local function generate(prompts, seed, temperature, max_tokens)
  if #prompts == 0 then return {} end
  return homeroom.generate {
    model = not params.handler and params.model or nil,
    handler = params.handler,
    prompts = prompts,
    max_tokens = max_tokens or params.max_tokens,
    temperature = temperature,
    seed = seed,
  }
end

local reasons, asked_before = {}, {}
local function leave_out(why)
  reasons[why] = (reasons[why] or 0) + 1
end

-- Whether the same was asked before, in other signs.
local function is_new(question)
  local key = question:lower():gsub("[^%w\128-\255]+", " ")
  if asked_before[key] then return false end
  asked_before[key] = true
  return true
end

local function kept_row(question, answer, row, by)
  return {
    messages = { { role = "user", content = question }, { role = "assistant", content = answer } },
    source = row.source,
    line = row.line,
    heading = row.heading,
    passage = row.text,
    written_by = by or params.handler or params.model,
  }
end

-- The language whose words a text has most of.
local function language_of(text)
  local counts, best = {}, "en"
  for word in text:lower():gmatch("[%w\128-\255]+") do
    counts[word] = (counts[word] or 0) + 1
  end
  local most = -1
  for _, name in { "en", "de", "es", "fr" } do
    local count = 0
    for word in LANGUAGES[name].words:gmatch("%S+") do
      count += counts[word] or 0
    end
    if count > most then best, most = name, count end
  end
  return LANGUAGES[best]
end

-- Sentences of a passage. An initial and a short word with a full stop end none, unless a word like `it` follows.
local function sentences_of(text)
  local sentences, from = {}, 1
  -- Links and emphasis of Markdown are no words.
  local flat = text:gsub("%s+", " "):gsub("%[([^%]]*)%]%([^%)]*%)", "%1"):gsub("%*%*?([^%*]+)%*%*?", "%1"):gsub("[%[%]]", "")
  for at, stop, behind in flat:gmatch("()([%.!%?])()%f[%s%z]") do
    local before = flat:sub(from, at - 1)
    local word = before:match("([%w\128-\255]+)$") or ""
    local following = flat:match("^%s+([%w\128-\255]+)", behind) or ""
    local is_short = stop == "." and (#word == 1 and word:find("%u") or #word <= 3 and word:find("^%u%l*$"))
    if not (is_short and #following > 0 and not COMMON[following:lower()]) and not following:find("^%l") then
      table.insert(sentences, (before .. stop):match("^%s*(.-)$"))
      from = behind
    end
  end
  return sentences
end

-- What a passage is about: its last heading, if that names something, or else the first word of it that is a name. Returns also whether it is
-- the heading.
local function topic_of(row)
  local heading = (row.heading:match("([^>]+)$") or ""):match("^%s*(.-)%s*$")
  local count, names = 0, #heading > 0 and not heading:find("[?!:`%[%]]")
  for word in heading:lower():gmatch("[%w\128-\255]+") do
    count += 1
    names = names and (not COMMON[word] or word == "the" or word == "of")
  end
  if names and count <= 4 then return heading, true end
  return row.text:match("^%s*([%u][%w\128-\255]+)") or row.text:match("([%w\128-\255]+)") or "", false
end

-- How well a question goes with a sentence, 0 to 1; and why it does not.
local function fits(question, sentence, topic, language)
  local problem = problem_of(question)
  if problem then return nil, "the question " .. problem end
  local lower = question:lower()
  local first = lower:match("^%S+") or ""
  local opens = false
  for opener in language.openers:gmatch("%S+") do
    opens = opens or first == opener or first:find("^" .. opener .. "['’]") ~= nil
  end
  if not opens then return nil, "the question does not begin as one" end
  -- Whoever is asked has to know what about.
  if covered(topic, question) == 0 then return nil, "the question does not say what it is about" end
  for asks, kind in pairs(language.asks) do
    if lower:sub(1, #asks + 1) == asks .. " " or lower:find(" " .. asks .. " ", 1, true) then
      if kind == "number" and not sentence:find("%d") and not sentence:lower():find("%f[%w](two|three|four|five)") then
        return nil, "the question asks for a number, and there is none"
      end
      -- A name has a capital within the sentence.
      if kind == "name" and not sentence:find("%s%u") then return nil, "the question asks for a person, and there is none" end
    end
  end
  -- The answer is to add something, and the question to come from the sentence.
  if covered(sentence, question) > 0.85 then return nil, "the question says the answer" end
  local own = question:gsub("[%w\128-\255]+", function(word)
    return covered(word, topic) > 0 and "" or word
  end)
  local _, count = words(own)
  if count == 0 then return 0.3 end
  local share = covered(own, sentence)
  if share < params.on_topic then return nil, "the question asks for something else" end
  return share
end

-- Verbs of English sentences that say something of their subject, as one asks for what they say.
local VERBS = {}
for verb, asks in ([[
  contains=What-contain belongs=What-belong-to reacts=What-react-with resembles=What-resemble consists=What-consist-of
  produces=What-produce includes=What-include constitutes=What-constitute means=What-mean needs=What-need eats=What-eat causes=What-cause
  occurs=Where-occur lives=Where-live grows=Where-grow lies=Where-lie flows=Where-flow
]]):gmatch("(%l+)=(%S+)") do
  VERBS[verb] = asks
end
-- Words behind `is` that begin what something is, and not how.
local DEFINES = { a = true, an = true, the = true, one = true, another = true }
local TO_BE = { is = true, are = true, was = true, were = true }
local PARTICIPLES = { found = true, made = true, known = true, written = true, built = true, given = true, seen = true }

-- Questions that follow from the form of an English sentence, where that is plain. What speaks of `it`, or of nobody, speaks of the topic.
local function by_form(sentence, topic, is_first)
  local body = sentence:gsub("[%.!]$", "")
  local subject, verb, rest
  for at, word in body:gmatch("()(%f[%w]%l+)%f[%W]") do
    if TO_BE[word] or VERBS[word] then
      subject, verb, rest = body:sub(1, at - 1):gsub("%s+$", ""), word, body:sub(at + #word + 1)
      break
    end
  end
  local opening, more = body:match("^(%u%l+) (.+)$")
  if opening and VERBS[opening:lower()] then
    subject, verb, rest = "It", opening:lower(), more
  elseif opening and not COMMON[opening:lower()] and (opening:find("ed$") or PARTICIPLES[opening:lower()]) then
    local is_past = more:find("%d%d%d%d") or more:find("by %u")
    subject, verb, rest = "It", is_past and "was" or "is", opening:lower() .. " " .. more
  elseif not subject and is_first and opening and not COMMON[opening:lower()] and not body:find(" %l+ed ") then
    -- A first sentence without a verb says what the topic is, as those of dictionaries do.
    return { ("What is %s?"):format(topic) }
  end
  if not subject or subject:find("[,;:%(]") or select(2, subject:gsub("%S+", "")) > 6 then
    return is_first and subject and body:find("^An? ") and { ("What is %s?"):format(topic) } or {}
  end
  local of = subject:match("^Its (.+)$") or subject:match("^Their (.+)$")
  if of and topic == "" then return {} end
  if of then
    subject = ("the %s of %s"):format(of, topic:lower())
  elseif subject == "It" or subject == "They" then
    if topic == "" then return {} end
    subject = topic
  elseif subject:find("^Th[ie]s[e]? ") or subject == "This" or subject == "There" or #subject == 0 then
    return {}
  elseif COMMON[(subject:match("^%S+") or ""):lower()] then
    subject = subject:sub(1, 1):lower() .. subject:sub(2)
  end
  local found = {}
  if VERBS[verb] then
    local asks, base = VERBS[verb]:match("^(%u%l+)%-(.+)$")
    if #rest > 0 then found[1] = ("%s does %s %s?"):format(asks, subject, (base:gsub("%-", " "))) end
    return found
  end
  local participle = rest:match("^(%l+)%f[%W]")
  if participle and (participle:find("ed$") or PARTICIPLES[participle]) then
    if rest:find(" by %u") then table.insert(found, ("By whom %s %s %s?"):format(verb, subject, participle)) end
    if rest:find(" in %d%d%d%d") then table.insert(found, ("When %s %s %s?"):format(verb, subject, participle)) end
    if participle == "used" then
      table.insert(found, ("What %s %s used for?"):format(verb, subject))
    elseif rest:find("^" .. participle .. " in %f[%a]%l") then
      table.insert(found, ("Where %s %s %s?"):format(verb, subject, participle))
    end
  elseif (verb == "is" or verb == "are") and (rest:find("^[%u%d]") or DEFINES[rest:match("^%l+") or ""]) then
    table.insert(found, ("What %s %s?"):format(verb, subject))
  end
  return found
end

-- Each sentence is the answer to a question that is yet to be found: one that follows from its form, or of several that are written the one
-- that has most of the sentence.
local function by_sentences()
  local tasks = {}
  for _, row in rows do
    local language = language_of(row.text)
    local topic, is_named = topic_of(row)
    local number = 0
    for place, sentence in sentences_of(row.text) do
      local _, count = words(sentence)
      if number < params.questions and count >= 3 and #sentence <= 300 and not sentence:find("```", 1, true) then
        number += 1
        local task = { row = row, sentence = sentence, topic = topic, language = language }
        if language == LANGUAGES.en then
          for _, question in by_form(sentence, is_named and topic or "", place == 1 and is_named) do
            -- What the sentence itself says is not beaten by what a model makes of it, and needs no check.
            if not task.question and (covered(topic, question) > 0 or not is_named) then task.question, task.is_sure = question, true end
          end
        end
        table.insert(tasks, task)
      end
    end
  end
  local prompts, open = {}, {}
  for _, task in tasks do
    if task.question then continue end
    local names, lines = task.language.names, { task.language.ask, "" }
    for number, example in task.language.examples do
      if number > params.examples then break end
      for part, name in names do table.insert(lines, ("%s: %s"):format(name, example[part])) end
      table.insert(lines, "")
    end
    table.insert(lines, ("%s: %s"):format(names[1], task.topic))
    table.insert(lines, ("%s: %s"):format(names[2], task.sentence))
    table.insert(lines, names[3] .. ":")
    table.insert(open, task)
    table.insert(prompts, table.concat(lines, "\n"))
  end
  local is_dry = false
  for round = 1, params.tries do
    -- The likeliest question first, and then others.
    for i, answer in generate(prompts, params.seed + round, round == 1 and 0 or 0.7) do
      local task, question = open[i], line_of(answer)
      is_dry = is_dry or answer == ""
      local score, why = fits(question, task.sentence, task.topic, task.language)
      if not score then
        task.why = task.why or why
      elseif score > (task.score or 0) then
        task.question, task.score = question, score
      end
    end
  end
  -- The round trip: who is asked the question finds the sentence in its passage.
  local kept, candidates, asked = {}, {}, {}
  for _, task in tasks do
    if is_dry then continue end
    if task.is_sure then
      if is_new(task.question) then table.insert(kept, kept_row(task.question, task.sentence, task.row, "the form of the sentence")) end
    elseif not task.question then
      leave_out(task.why)
    elseif not is_new(task.question) then
      leave_out("the question was asked before")
    else
      table.insert(candidates, task)
      table.insert(asked, ANSWER:format(task.row.text, task.question))
    end
  end
  for i, answer in generate(asked, params.seed, 0) do
    local task, said = candidates[i], line_of(answer)
    if math.max(covered(said, task.sentence), covered(task.sentence, said)) < params.agreement then
      leave_out("the answer is found elsewhere")
    else
      table.insert(kept, kept_row(task.question, task.sentence, task.row))
    end
  end
  return kept, #tasks
end

-- Questions about whole passages, answered twice.
local function by_passages()
  local candidates = {}
  for round = 1, params.questions do
    local prompts = {}
    for i, row in rows do prompts[i] = ASK:format(row.text) end
    -- Each round draws other questions.
    for i, answer in generate(prompts, params.seed + round, 0.8) do
      local question = line_of(answer)
      -- A dry run asks nobody.
      if answer == "" then continue end
      local problem = problem_of(question)
      if problem then
        leave_out("the question " .. problem)
      elseif not is_new(question) then
        leave_out("the question was asked before")
      else
        table.insert(candidates, { question = question, row = rows[i] })
      end
    end
  end
  -- Both answer from the passage; the second is to find the same without knowing the first.
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
      table.insert(kept, kept_row(candidate.question, answer, candidate.row))
    end
  end
  return kept, #rows * params.questions
end

local METHODS = { sentences = by_sentences, passages = by_passages }
local write = METHODS[params.method] or error(("method: %s is none; sentences or passages"):format(params.method))
local kept, asked = write()
for why, count in reasons do print(("left out  %4d   %s"):format(count, why)) end
if #kept == 0 then
  if not next(reasons) then return { rows = 0, passages = #rows } end
  homeroom.log.warn("no row was kept: a larger model, or another `passage_words`, writes better questions")
  return { rows = 0, passages = #rows, left_out = reasons }
end
local saved = homeroom.save_dataset { dataset = homeroom.dataset { rows = kept }, name = params.name }
print(("kept      %4d of %d   read them before you train: %s"):format(#kept, asked, saved.path))
return { rows = #kept, path = saved.path, passages = #rows, left_out = reasons }
