package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm/hsmtest"
)

// TestSoftHSMService runs the program on a SoftHSM token: master keys of every
// size are made and unwrap, its processes can't be dumped or read, and no file
// it writes, nor its output, arguments or environment, holds a data key or the
// PIN.
func TestSoftHSMService(t *testing.T) {
	cfg := hsmtest.SoftHSM(t, "service")
	in := newInstallation(t, &cfg, nil)
	keyrings := []string{"ring"}
	for _, bits := range []int{2048, 3072, 4096} {
		name := fmt.Sprint("rsa-", bits)
		k, err := in.officer.CreateKey(in.ctx(), connector.NewKey{RequestID: name, Vault: "v", Name: name, Bits: bits})
		if err != nil || k.Bits != bits {
			t.Fatalf("RSA-%d: got %d bits, %v", bits, k.Bits, err)
		}
		if _, err := in.officer.CreateKeyring(in.ctx(), connector.NewKeyring{RequestID: name, Vault: "v", Name: name, MasterKey: name}); err != nil {
			t.Fatal(err)
		}
		keyrings = append(keyrings, name)
	}
	db, token, err := in.officer.PrepareInstance(in.ctx(), connector.NewInstance{RequestID: "all", Kind: "mariadb", Name: "all", Vault: "v", Keyrings: keyrings})
	if err != nil {
		t.Fatal(err)
	}
	keys := in.dataKeys(in.enrol("all", in.officer.TokenFile(token, db)), "all")
	if len(keys) != len(keyrings) {
		t.Fatalf("%d data keys, want %d", len(keys), len(keyrings))
	}
	in.hardened()
	out := in.path("backup.file")
	done := startProgram(t, in.dir, in.env, "backup", "--config", in.config(), "-o", out)
	if <-done.done; done.cmd.ProcessState.ExitCode() != 0 {
		t.Fatalf("backup: %s", in.log())
	}
	secrets := [][]byte{[]byte(hsmtest.PIN)}
	for _, k := range keys {
		secrets = append(secrets, k, []byte(hex.EncodeToString(k)))
	}
	if n := in.search(secrets); n < 8 {
		t.Errorf("only %d files were searched", n)
	}
}

// dataKeys unwraps all versions of an instance, as its database would.
func (in *installation) dataKeys(c *connector.Client, instance string) (keys [][]byte) {
	in.t.Helper()
	opened, err := c.OpenInstance(in.ctx(), instance, true, nil)
	if err != nil {
		in.t.Fatal(err)
	}
	for _, r := range opened.Keyrings {
		for _, v := range r.Versions {
			w, err := dek.ParseWrapped(v.Wrapped)
			if err != nil {
				in.t.Fatal(err)
			}
			k, err := c.Unwrap(in.ctx(), w)
			if err == nil {
				err = k.Use(func(b []byte) error { keys = append(keys, bytes.Clone(b)); return nil })
				k.Destroy()
			}
			if err != nil {
				in.t.Fatalf("%s: %v", r.Name, err)
			}
		}
	}
	return keys
}

// hardened checks the service and its token child: no core file, and nothing
// of theirs belongs to their user, who could read it.
func (in *installation) hardened() {
	in.t.Helper()
	parent := in.program.cmd.Process.Pid
	pids := []string{fmt.Sprint(parent)}
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
	if err != nil {
		in.t.Fatal(err)
	}
	for _, l := range lists {
		b, err := os.ReadFile(l)
		if err != nil {
			in.t.Fatal(err)
		}
		pids = append(pids, strings.Fields(string(b))...)
	}
	if len(pids) != 2 {
		in.t.Fatalf("processes %v, want the service and its child", pids)
	}
	for _, pid := range pids {
		limits, err := os.ReadFile("/proc/" + pid + "/limits")
		if err != nil {
			in.t.Fatal(err)
		}
		for line := range strings.Lines(string(limits)) {
			if rest, ok := strings.CutPrefix(line, "Max core file size"); ok && strings.Fields(rest)[1] != "0" {
				in.t.Errorf("process %s may leave a core file: %s", pid, line)
			}
		}
		for _, f := range []string{"cmdline", "environ"} {
			b, err := os.ReadFile("/proc/" + pid + "/" + f) // root may, its own user may not
			if err == nil && bytes.Contains(b, []byte(hsmtest.PIN)) {
				in.t.Errorf("the PIN is in %s of process %s", f, pid)
			}
		}
	}
}

// search looks through every file of the installation and counts them. The PIN
// file is elsewhere.
func (in *installation) search(secrets [][]byte) (files int) {
	in.t.Helper()
	err := filepath.WalkDir(in.dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		files++
		for i, s := range secrets {
			if bytes.Contains(b, s) {
				in.t.Errorf("secret %d is in %s", i, name)
			}
		}
		return nil
	})
	if err != nil {
		in.t.Fatal(err)
	}
	return files
}

// TestStartRefused: what is wrong around the token ends the start with one
// error that names it, and status 1; put right, everything is as before.
func TestStartRefused(t *testing.T) {
	cfg := hsmtest.SoftHSM(t, "start")
	in := newInstallation(t, &cfg, nil)
	in.kill()
	base := filepath.Dir(cfg.PINFile)
	config, err := os.ReadFile(in.config())
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(name, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
	}
	rename := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	tokens := hsmtest.TokenDir(base)
	for _, tt := range []struct {
		name        string
		spoil, mend func()
		want        string
	}{
		{"world-readable PIN", func() { write(cfg.PINFile, hsmtest.PIN, 0o644) }, func() { write(cfg.PINFile, hsmtest.PIN, 0o600) }, cfg.PINFile},
		{"no PIN", func() { rename(cfg.PINFile, cfg.PINFile+".away") }, func() { rename(cfg.PINFile+".away", cfg.PINFile) }, cfg.PINFile},
		{"wrong PIN", func() { write(cfg.PINFile, "not-the-pin", 0o600) }, func() { write(cfg.PINFile, hsmtest.PIN, 0o600) }, "PIN"},
		{"wrong label", func() { write(in.config(), strings.Replace(string(config), "token=start", "token=stop", 1), 0o600) },
			func() { write(in.config(), string(config), 0o600) }, "stop"},
		{"another token of that label", func() {
			rename(tokens, tokens+".away")
			if err := os.Mkdir(tokens, 0o700); err != nil {
				t.Fatal(err)
			}
			hsmtest.InitSoftHSM(t, base, "start")
		}, func() {
			if err := os.RemoveAll(tokens); err != nil {
				t.Fatal(err)
			}
			rename(tokens+".away", tokens)
		}, "serial"},
		{"unknown key", func() { write(in.config(), strings.Replace(string(config), `"listen"`, `"lisen"`, 1), 0o600) },
			func() { write(in.config(), string(config), 0o600) }, "lisen"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.spoil()
			out, status := in.try("serve", "--config", in.config())
			tt.mend()
			if status != exitFailed || !strings.Contains(out, tt.want) || strings.Contains(out, "not-the-pin") {
				t.Errorf("status %d, want %d and an error that names %q:\n%s", status, exitFailed, tt.want, out)
			}
		})
	}
	in.start()
	if err := in.unwrapAll(); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

// try runs the program to its end.
func (in *installation) try(args ...string) (string, int) {
	in.t.Helper()
	ctx, cancel := context.WithCancel(in.ctx())
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(append(os.Environ(), in.env...), asProgram+"=1")
	out, _ := cmd.CombinedOutput() // its status says how it ended
	return string(out), cmd.ProcessState.ExitCode()
}
