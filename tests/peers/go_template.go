// Renders templates as Ollama does: Go's text/template over the messages and the system message.
// Reads {"template", "conversations": [{"System", "Messages": [{"Role", "Content"}]}]} line by line, writes a list of texts for each; one
// that fails is null. Run: go run go_template.go < jobs.jsonl
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

type conversation struct {
	System   string
	Messages []*message
}

type job struct {
	Template      string
	Conversations []conversation
}

func main() {
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<26)
	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	for in.Scan() {
		var work job
		if err := json.Unmarshal(in.Bytes(), &work); err != nil {
			panic(err)
		}
		texts := make([]*string, len(work.Conversations))
		parsed, err := template.New("").Parse(work.Template)
		for i, c := range work.Conversations {
			var text strings.Builder
			fields := map[string]any{"System": c.System, "Messages": c.Messages, "Response": ""}
			if err == nil && parsed.Execute(&text, fields) == nil {
				done := text.String()
				texts[i] = &done
			}
		}
		if err := out.Encode(texts); err != nil {
			panic(err)
		}
	}
}
