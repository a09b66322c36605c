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
	ctr := question{name: "mariadb/page_crypt", against: "the server's built-in AES-CTR", unit: "pages/s", goal: ">= 1.15"}
	cbc := question{name: "mariadb/page_crypt_cbc", against: "the server's built-in AES-CBC (its default)", unit: "pages/s", goal: ">= 4"}
	own := question{name: "mariadb/page_crypt_cbc/cbc", against: "the same, ours in AES-CBC too", unit: "pages/s", goal: ">= 1"}
	return []Result{
		ctr.compare(pages["ctr"].ours, pages["ctr"].builtin),
		cbc.compare(pages["ctr"].ours, pages["cbc"].builtin),
		own.compare(pages["cbc"].ours, pages["cbc"].builtin),
	}, nil
}

// A pageSeries holds pages per second, sealed and opened, by round.
type pageSeries struct{ ours, builtin []float64 }

// parsePages reads lines of cipher, direction, our and the built-in time of a
// page in ns; a round has one line for each direction.
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
			s.ours = append(s.ours, 1e9/(ts[i].ours+ts[i+1].ours))
			s.builtin = append(s.builtin, 1e9/(ts[i].builtin+ts[i+1].builtin))
		}
		series[cipher] = s
	}
	return series, nil
}
