//go:build !race

package etcdstore_test

const raceDetector = false
