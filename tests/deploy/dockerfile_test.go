package deploy

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// The stages of a Dockerfile, as BuildKit reads them.
func stages(t *testing.T, file string) []instructions.Stage {
	t.Helper()
	parsed, err := parser.Parse(strings.NewReader(read(t, file)))
	if err != nil {
		t.Fatal(err)
	}
	stages, _, err := instructions.Parse(parsed.AST, nil)
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return stages
}

// The commands of a stage that are of one type.
func of[T instructions.Command](stage instructions.Stage) []T {
	var found []T
	for _, command := range stage.Commands {
		if command, is := command.(T); is {
			found = append(found, command)
		}
	}
	return found
}

func TestImageHasTheBinaryAloneAndRunsItWithoutRoot(t *testing.T) {
	stages := stages(t, path(t, "deploy", "Dockerfile"))
	last := stages[len(stages)-1]
	if last.BaseName != "scratch" || len(of[*instructions.RunCommand](last)) > 0 {
		t.Error("there is more in the image than the binary")
	}
	users := of[*instructions.UserCommand](last)
	if len(users) != 1 || strings.HasPrefix(users[0].User, "0") || strings.HasPrefix(users[0].User, "root") {
		t.Error("it runs as root")
	}
	for _, stage := range stages[:len(stages)-1] {
		if base := strings.NewReplacer("${RUST}", argument(t, "RUST"), "${BINARY}", "").Replace(stage.BaseName); base != "" && base != "scratch" {
			assertPinned(t, base)
		}
	}
}

// The default of an argument of the Dockerfile.
func argument(t *testing.T, name string) string {
	t.Helper()
	_, rest, found := strings.Cut(read(t, path(t, "deploy", "Dockerfile")), "\nARG "+name+"=")
	if !found {
		t.Fatalf("no argument %s", name)
	}
	value, _, _ := strings.Cut(rest, "\n")
	return value
}

func TestHealthCheckIsACommandOfTheBinary(t *testing.T) {
	stages := stages(t, path(t, "deploy", "Dockerfile"))
	last := stages[len(stages)-1]
	check := of[*instructions.HealthCheckCommand](last)[0].Health.Test
	entry := of[*instructions.EntrypointCommand](last)[0].CmdLine
	if check[0] != "CMD" || check[1] != entry[0] {
		t.Fatalf("%q is not what the image has", check)
	}
	run(t, binary(t), append(check[2:], "--help")...)
}

func TestDockerfilesCopyWhatThereIs(t *testing.T) {
	for file, context := range map[string]string{"Dockerfile": ".", "demo-agent.Dockerfile": "tests/real"} {
		for _, stage := range stages(t, path(t, "deploy", file)) {
			for _, copied := range of[*instructions.CopyCommand](stage) {
				if copied.From != "" {
					continue
				}
				for _, source := range copied.SourcePaths {
					// The script of a release makes it.
					if strings.HasPrefix(source, "dist/") {
						continue
					}
					found, err := filepath.Glob(path(t, context, source))
					if err != nil || len(found) == 0 {
						t.Errorf("%s: there is no %s in %s", file, source, context)
					}
				}
			}
		}
	}
}

// What the context leaves out can't be copied.
func TestWhatTheImageIsBuiltFromIsInItsContext(t *testing.T) {
	kept := map[string]bool{}
	for _, line := range strings.Fields(read(t, path(t, "deploy", "Dockerfile.dockerignore"))) {
		kept[strings.TrimPrefix(line, "!")] = strings.HasPrefix(line, "!")
	}
	copied := map[string]bool{}
	for _, command := range of[*instructions.CopyCommand](stages(t, path(t, "deploy", "Dockerfile"))[0]) {
		for _, source := range command.SourcePaths {
			copied[source] = true
			if !kept[source] {
				t.Errorf("%s is left out of the context", source)
			}
		}
	}
	// The code includes files that are not in src.
	included := regexp.MustCompile(`include_(?:str|bytes)!\((?:concat!\()?"(?:\.\./)+([a-z]+)/`)
	var folders []string
	err := filepath.WalkDir(path(t, "src"), func(file string, entry fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(file) != ".rs" || strings.HasSuffix(file, "tests.rs") {
			return err
		}
		for _, found := range included.FindAllStringSubmatch(read(t, file), -1) {
			folders = append(folders, found[1])
		}
		return nil
	})
	if err != nil || !slices.Contains(folders, "docs") {
		t.Fatalf("the page shows the documentation, but only these are found: %v %v", folders, err)
	}
	for _, folder := range folders {
		_, inside := os.Stat(path(t, "src", folder))
		if !copied[folder] && inside != nil {
			t.Errorf("the code includes files of %s, which is not copied", folder)
		}
	}
}
