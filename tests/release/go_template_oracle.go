// Reads JSON lines {"template", "messages"} and writes JSON lines of rendered text, as Ollama's template package does.
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct {
	Role    string
	Content string
}

func main() {
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<30)
	out := json.NewEncoder(os.Stdout)
	for in.Scan() {
		var job struct {
			Template string
			Messages []*Message
		}
		if err := json.Unmarshal(in.Bytes(), &job); err != nil {
			panic(err)
		}
		var text strings.Builder
		t, err := template.New("").Option("missingkey=zero").Parse(job.Template)
		if err == nil {
			err = t.Execute(&text, map[string]any{"Messages": job.Messages, "System": "", "Response": ""})
		}
		if err != nil {
			out.Encode(map[string]any{"error": err.Error()})
		} else {
			out.Encode(map[string]any{"text": text.String()})
		}
	}
}
