package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/keyward/keyward/plugins/mariadb/mariadbtest"
)

const (
	// pagesPerRound take some 10 ms a kind: many short rounds shrug off what
	// else the machine does.
	pagesPerRound     = 2000
	pageRoundsPerOurs = 20
)

// pageCrypt measures InnoDB's unit of encryption, a 16 KiB page sealed and
// opened once, through the plugin's functions and through the server's own.
func pageCrypt(ctx context.Context, b *bench) ([]Result, error) {
	lib, err := mariadbtest.BuildPlugin(ctx, filepath.Join(b.root, "plugins", "mariadb"), "all")
	if err != nil {
		return nil, err
	}
	rounds := b.rounds * b.pick(pageRoundsPerOurs, 1)
	out, err := exec.CommandContext(ctx, filepath.Join(filepath.Dir(lib), "pagecrypt"),
		strconv.Itoa(rounds), strconv.Itoa(b.pick(pagesPerRound, 100))).Output()
	if err != nil {
		return nil, fmt.Errorf("pagecrypt: %w", err)
	}
	pages, err := parsePages(out, rounds)
	if err != nil {
		return nil, err
	}
	const ctrBuiltin, cbcBuiltin = "the server's built-in AES-CTR", "the server's built-in AES-CBC (its default)"
	ask := func(name, against, goal string, ours, other []float64) Result {
		q := question{name: "mariadb/" + name, against: against, unit: "pages/s", goal: goal}
		return q.compare(ours, other)
	}
	ctr, cbc := pages["ctr"], pages["cbc"]
	return []Result{
		ask("page_crypt", ctrBuiltin+", sealed and opened once", ">= 1.15", ctr.ours.both, ctr.builtin.both),
		ask("page_crypt/seal", ctrBuiltin, "", ctr.ours.seal, ctr.builtin.seal),
		// CBC can be opened in parallel but sealed only block by block.
		ask("page_crypt_cbc", cbcBuiltin+", sealed; ours is AES-CTR", ">= 4", ctr.ours.seal, cbc.builtin.seal),
		ask("page_crypt_cbc/both", cbcBuiltin+", sealed and opened once; ours is AES-CTR", "", ctr.ours.both, cbc.builtin.both),
		ask("page_crypt_cbc/cbc", cbcBuiltin+", sealed and opened once; ours is AES-CBC", "", cbc.ours.both, cbc.builtin.both),
	}, nil
}

// A pageSeries holds pages per second by round.
type pageSeries struct{ ours, builtin pageRates }

type pageRates struct{ seal, both []float64 }

func (r *pageRates) add(seal, open float64) {
	r.seal, r.both = append(r.seal, 1e9/seal), append(r.both, 1e9/(seal+open))
}

// parsePages reads lines of cipher, direction, our and the built-in time of a
// page in ns; a round has a line for encrypt and then one for decrypt.
func parsePages(out []byte, rounds int) (map[string]*pageSeries, error) {
	type times struct{ ours, builtin float64 }
	byCipher := map[string][]times{}
	lines := bufio.NewScanner(bytes.NewReader(out))
	for lines.Scan() {
		var cipher, direction string
		var t times
		if _, err := fmt.Sscan(lines.Text(), &cipher, &direction, &t.ours, &t.builtin); err != nil {
			return nil, fmt.Errorf("pagecrypt printed %q: %w", lines.Text(), err)
		}
		if want := []string{"encrypt", "decrypt"}[len(byCipher[cipher])%2]; direction != want {
			return nil, fmt.Errorf("pagecrypt printed %q, want %s", lines.Text(), want)
		}
		byCipher[cipher] = append(byCipher[cipher], t)
	}
	series := map[string]*pageSeries{}
	for _, cipher := range []string{"ctr", "cbc"} {
		ts := byCipher[cipher]
		if len(ts) != 2*rounds {
			return nil, fmt.Errorf("pagecrypt printed %d lines of %s, want %d", len(ts), cipher, 2*rounds)
		}
		s := &pageSeries{}
		for i := 0; i < len(ts); i += 2 {
			s.ours.add(ts[i].ours, ts[i+1].ours)
			s.builtin.add(ts[i].builtin, ts[i+1].builtin)
		}
		series[cipher] = s
	}
	return series, nil
}
