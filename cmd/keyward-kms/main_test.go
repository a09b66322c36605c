package main

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/keyward/keyward/hsm"
)

// asProgram makes the test binary the program itself.
const asProgram = "KEYWARD_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	// The token child is started by the program under test, from this binary.
	if len(os.Args) == 2 && os.Args[1] == childArgument {
		os.Exit(hsm.RunChild(context.Background()))
	}
	if os.Getenv(asProgram) == "1" {
		main()
	}
	testscript.Main(m, map[string]func(){"keyward-kms": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata/script"})
}

// TestConfig edits a good configuration; every mistake is named by its field.
func TestConfig(t *testing.T) {
	for name, test := range map[string]struct {
		edit  func(map[string]any)
		wants []string // empty: accepted
	}{
		"good":               {func(map[string]any) {}, nil},
		"software token":     {func(c map[string]any) { delete(c, "token"); c["software_token"] = "/var/lib/soft" }, nil},
		"unknown key":        {func(c map[string]any) { c["statedir"] = "x" }, []string{"statedir"}},
		"unknown token key":  {func(c map[string]any) { c["token"].(map[string]any)["pin"] = "1234" }, []string{"pin"}},
		"relative state":     {func(c map[string]any) { c["state_dir"] = "state" }, []string{"state_dir"}},
		"no listener":        {func(c map[string]any) { delete(c, "listen") }, []string{"listen"}},
		"listener no port":   {func(c map[string]any) { c["listen"] = []string{"localhost"} }, []string{"listen"}},
		"both tokens":        {func(c map[string]any) { c["software_token"] = "/x" }, []string{"token"}},
		"no token":           {func(c map[string]any) { delete(c, "token") }, []string{"token"}},
		"relative module":    {func(c map[string]any) { c["token"].(map[string]any)["module"] = "libsofthsm2.so" }, []string{"token.module"}},
		"no pin file":        {func(c map[string]any) { delete(c["token"].(map[string]any), "pin_file") }, []string{"token.pin_file"}},
		"deadline":           {func(c map[string]any) { c["token"].(map[string]any)["deadline"] = "1h" }, []string{"token.deadline"}},
		"public metrics":     {func(c map[string]any) { c["metrics_listen"] = "0.0.0.0:9100" }, []string{"metrics_listen"}},
		"certificate days":   {func(c map[string]any) { c["client_days"] = 365 }, []string{"client_days"}},
		"etcd without TLS":   {func(c map[string]any) { c["etcd_endpoints"] = []string{"https://a:2379"} }, []string{"etcd_endpoints"}},
		"all mistakes":       {func(c map[string]any) { c["state_dir"] = ""; c["client_days"] = -1 }, []string{"state_dir", "client_days"}},
		"wrong type":         {func(c map[string]any) { c["listen"] = "localhost:1" }, []string{"listen"}},
		"relative backup":    {func(c map[string]any) { c["backup_dir"] = "backup" }, []string{"backup_dir"}},
		"too many workers":   {func(c map[string]any) { c["token"].(map[string]any)["workers"] = 1000 }, []string{"token.workers"}},
		"endpoint certainly": {func(c map[string]any) { c["names"] = []string{"kms.example"} }, nil},
		"pin of systemd":     {func(c map[string]any) { c["token"].(map[string]any)["pin_file"] = "$CREDENTIALS_DIRECTORY/pin" }, nil},
		"pin of another var": {func(c map[string]any) { c["token"].(map[string]any)["pin_file"] = "$HOME/pin" }, []string{"token.pin_file"}},
		"pin outside of it":  {func(c map[string]any) { c["token"].(map[string]any)["pin_file"] = "$CREDENTIALS_DIRECTORY/../pin" }, []string{"token.pin_file"}},
		"all addresses":      {func(c map[string]any) { c["listen"] = []string{":7443"} }, []string{"names"}},
		"unspecified":        {func(c map[string]any) { c["listen"] = []string{"127.0.0.1:1", "[::]:7443"} }, []string{"names"}},
		"all, with a name":   {func(c map[string]any) { c["listen"] = []string{"0.0.0.0:1"}; c["names"] = []string{"kms.example"} }, nil},
		"port 0":             {func(c map[string]any) { c["listen"] = []string{"127.0.0.1:0"} }, []string{"listen"}},
		"wildcard name":      {func(c map[string]any) { c["names"] = []string{"*.example"} }, []string{"names"}},
		"relative etcd key": {func(c map[string]any) {
			c["etcd_endpoints"], c["etcd_ca"], c["etcd_cert"], c["etcd_key"] = []string{"https://a:2379"}, "/ca", "/cert", "key"
		}, []string{"etcd_key"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := map[string]any{"state_dir": "/var/lib/keyward-kms", "listen": []string{"127.0.0.1:7443"},
				"token": map[string]any{"module": "/usr/lib/softhsm/libsofthsm2.so", "uri": "pkcs11:token=keyward", "pin_file": "/etc/keyward/pin"}}
			test.edit(c)
			b, err := json.Marshal(c)
			if err != nil {
				t.Fatal(err)
			}
			_, err = parseConfig(b)
			if (err == nil) != (len(test.wants) == 0) {
				t.Fatalf("got error %v, want one that names %v", err, test.wants)
			}
			for _, w := range test.wants {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not name %q", err, w)
				}
			}
		})
	}
	if _, err := parseConfig([]byte(`{} {}`)); err == nil {
		t.Error("text after the configuration was accepted")
	}
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"state_dir":"/s","listen":["127.0.0.1:1"],"software_token":"/t"}`))
	f.Add([]byte(`{"token":{"module":"/m","uri":"pkcs11:token=x","pin_file":"/p"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := parseConfig(b)
		if (c == nil) == (err == nil) {
			t.Errorf("got config %v and error %v", c, err)
		}
	})
}

// TestWriteFile: the old file or the new one, never a piece.
func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "f")
	if err := writeFile(name, strings.NewReader("old")); err != nil {
		t.Fatal(err)
	}
	broken := io.MultiReader(strings.NewReader("half"), &failingReader{})
	if err := writeFile(name, broken); err == nil {
		t.Error("a broken source was accepted")
	}
	if b, err := os.ReadFile(name); err != nil || string(b) != "old" {
		t.Errorf("got %q (%v), want the old file", b, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".new-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

type failingReader struct{}

func (*failingReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// A program is a running keyward-kms.
type program struct {
	cmd  *exec.Cmd
	done chan struct{}
}

// startProgram runs the test binary as keyward-kms; its output goes to the log
// file in dir.
func startProgram(t testing.TB, dir string, env []string, args ...string) *program {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p := &program{cmd: exec.Command(exe, args...), done: make(chan struct{})}
	p.cmd.Env = append(append(os.Environ(), env...), asProgram+"=1")
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait() // how it ended is the business of who ended it
		close(p.done)
	}()
	t.Cleanup(func() { p.end(syscall.SIGKILL) })
	return p
}

// end sends sig and waits. SIGKILL goes to the service and its token child.
func (p *program) end(sig syscall.Signal) {
	pid := p.cmd.Process.Pid
	if sig == syscall.SIGKILL {
		pid = -pid
	}
	_ = syscall.Kill(pid, sig)
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
	}
}
