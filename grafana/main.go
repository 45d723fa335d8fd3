// Writes the dashboards: run `go run .` in this folder after a change. What Grafana reads are the files; a test holds
// them equal to what this makes.
package main

import (
	"encoding/json"
	"log"
	"os"
	"strings"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

// The oldest schema that has all that is used here: Grafana 11's. Later versions migrate it as they load it.
const schemaVersion = 39

// What is made, by the file that it is kept in.
var dashboards = map[string]func() (dashboard.Dashboard, error){
	"dashboards/overview.json": overview,
	"dashboards/target.json":   target,
}

func main() {
	log.SetFlags(0)
	for file, make := range dashboards {
		text, err := render(make)
		if err == nil {
			err = os.WriteFile(file, text, 0o644)
		}
		if err != nil {
			log.Fatalf("%s: %v", file, err)
		}
	}
}

func render(make func() (dashboard.Dashboard, error)) ([]byte, error) {
	made, err := make()
	if err != nil {
		return nil, err
	}
	made.SchemaVersion = schemaVersion
	identify(made.Panels)
	text, err := json.MarshalIndent(made, "", "  ")
	// Go escapes what would matter in HTML, and a query full of \u003e can't be read in a diff.
	readable := strings.NewReplacer(`\u003e`, ">", `\u003c`, "<", `\u0026`, "&").Replace(string(text))
	return []byte(readable + "\n"), err
}

// Links and alerts name a panel by its number.
func identify(panels []dashboard.PanelOrRowPanel) {
	for index, one := range panels {
		id := uint32(index + 1)
		if one.Panel != nil {
			one.Panel.Id = cog.ToPtr(id)
		} else {
			one.RowPanel.Id = id
		}
	}
}
