package archtest

import (
	"bytes"
	"encoding/json"
	"io"
	"os/exec"
	"path"
	"strings"
	"testing"
)

const module = "github.com/keyward/keyward"

// rules says what each package (or "folder/...") may import of ours. Do not
// edit it to get green: a new arrow is a decision, with its reason in the
// commit. The most specific row wins.
var rules = map[string][]string{
	"dek":            {},
	"dek/recovery":   {"dek"},
	"dek/stream":     {"dek"},
	"hsm":            {"dek"},
	"hsm/hsmtest":    {"dek", "hsm"},
	"kms":            {"dek", "dek/recovery"},
	"kms/access":     {"dek", "kms"},
	"kms/identity":   {"dek", "kms"},
	"kms/events":     {"dek", "kms"},
	"kms/kmspb":      {},
	"kms/rpc":        {"dek", "kms", "kms/..."},
	"kms/azure":      {"dek", "kms", "kms/..."},
	"kms/etcdstore":  {"dek", "kms"},
	"kms/audit":      {"dek", "kms"},
	"kms/storetest":  {"dek", "kms"},
	"connector":      {"dek", "kms/kmspb"},
	"plugins/...":    {"connector", "dek", "dek/stream", "plugins/..."},
	"cmd/...":        {"..."},
	"benchmarks":     {"..."},
	"benchmarks/...": {"..."},
}

// alone names third-party modules and the packages that may import them.
var alone = map[string][]string{
	"github.com/ThalesIgnite/crypto11": {"hsm"},
	"github.com/miekg/pkcs11":          {"hsm", "hsm/...", "benchmarks"},
	"github.com/hashicorp/golang-lru":  {"dek", "benchmarks"},
	"go.etcd.io":                       {"kms/etcdstore"},
	"google.golang.org/grpc":           {"kms/rpc", "kms/kmspb", "connector", "benchmarks", "cmd/..."},
	"google.golang.org/protobuf":       {"kms/etcdstore", "kms/rpc", "kms/kmspb", "connector", "cmd/..."},
	"golang.org/x/mod/sumdb":           {"kms/audit"},
	"github.com/go-sql-driver/mysql":   {"plugins/...", "cmd/...", "benchmarks"},
	"github.com/spf13/cobra":           {"cmd/..."},
}

type pkg struct {
	ImportPath  string
	Imports     []string
	TestImports []string
}

func TestImportRules(t *testing.T) {
	pkgs := list(t)
	if len(pkgs) < 10 {
		t.Fatalf("go list found %d packages: the test looks at nothing", len(pkgs))
	}
	for _, p := range pkgs {
		name := strings.TrimPrefix(p.ImportPath, module+"/")
		allowed, known := lookup(name)
		if !known {
			t.Errorf("%s: no rule for this package: new packages are a decision", name)
			continue
		}
		for _, imp := range p.Imports {
			ours, isOurs := strings.CutPrefix(imp, module+"/")
			if isOurs && !match(allowed, ours) {
				t.Errorf("%s imports %s: not allowed", name, ours)
			}
			if mods := owners(imp); mods != nil && !isOurs && !match(mods, name) {
				t.Errorf("%s imports %s: only %v may", name, imp, mods)
			}
		}
	}
}

// TestPureGo: the agent and the CLI are static; no cgo, PKCS#11 or etcd in them.
func TestPureGo(t *testing.T) {
	for _, cmd := range []string{"cmd/keyward", "cmd/keyward-agent"} {
		list := exec.Command("go", "list", "-deps", module+"/"+cmd)
		list.Env = append(list.Environ(), "CGO_ENABLED=0")
		out, err := list.Output()
		if err != nil {
			t.Fatalf("go list -deps %s: %v", cmd, err)
		}
		for _, dep := range strings.Fields(string(out)) {
			for _, bad := range []string{"runtime/cgo", "github.com/miekg/pkcs11", "go.etcd.io/etcd/server", module + "/hsm"} {
				if strings.HasPrefix(dep, bad) {
					t.Errorf("%s depends on %s", cmd, dep)
				}
			}
		}
	}
}

// TestTopLevel: the house has fixed rooms.
func TestTopLevel(t *testing.T) {
	rooms := map[string]bool{"cmd": true, "connector": true, "kms": true, "dek": true, "hsm": true, "plugins": true, "benchmarks": true}
	for _, p := range list(t) {
		room, _, _ := strings.Cut(strings.TrimPrefix(p.ImportPath, module+"/"), "/")
		if !rooms[room] {
			t.Errorf("%s stands outside the house", p.ImportPath)
		}
		for _, bad := range []string{"util", "utils", "common", "helpers", "errors", "log", "grpc"} {
			if path.Base(p.ImportPath) == bad {
				t.Errorf("%s: forbidden name", p.ImportPath)
			}
		}
	}
}

func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports", module+"/...")
	// The agent and CLI build without cgo, the KMS with it: list with it.
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=1")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); err == io.EOF {
			return pkgs
		} else if err != nil {
			t.Fatalf("go list output: %v", err)
		}
		pkgs = append(pkgs, p)
	}
}

func lookup(name string) ([]string, bool) {
	if r, ok := rules[name]; ok {
		return r, true
	}
	for dir := name; dir != "."; dir = path.Dir(dir) {
		if r, ok := rules[dir+"/..."]; ok {
			return r, true
		}
	}
	return nil, false
}

func owners(imp string) []string {
	for mod, pkgs := range alone {
		if imp == mod || strings.HasPrefix(imp, mod+"/") {
			return pkgs
		}
	}
	return nil
}

func match(patterns []string, name string) bool {
	for _, p := range patterns {
		if p == "..." || p == name {
			return true
		}
		if dir, ok := strings.CutSuffix(p, "/..."); ok && strings.HasPrefix(name, dir+"/") {
			return true
		}
	}
	return false
}
